"""The scripts that the server runs: each is one step that no other node sees half done.

All times are those of the server. A script touches keys of one slot only.
"""

# The most holders of one blob that are remembered; another one replaces any.
MAX_HOLDERS = 32

# Milliseconds of the server's clock.
_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# KEYS: rows, beats, state. ARGV: id, instance, row, milliseconds of silence, milliseconds until a silent node is
# forgotten, a proposal for the epoch.
# Invariant: a row belongs to one instance. Another instance gets it only after the first has been silent, so two
# nodes with one address are never both members.
# Returns {0, when the other instance was seen} or {1, now, version of the rows, epoch, ids of silent nodes}. The
# epoch is new if the server has lost everything.
BEAT = f"""{_NOW}
local id, instance, row = ARGV[1], ARGV[2], ARGV[3]
local silent, forgotten = now - ARGV[4], now - ARGV[5]
local known = redis.call('HGET', KEYS[1], id)
local beat = redis.call('ZSCORE', KEYS[2], id)
if known and beat and string.sub(known, 1, #instance + 1) ~= instance .. ' '
    and tonumber(beat) > silent then
  return {{0, beat}}
end
redis.call('HSETNX', KEYS[3], 'epoch', ARGV[6])
if known ~= row then
  redis.call('HSET', KEYS[1], id, row)
  redis.call('HINCRBY', KEYS[3], 'version', 1)
end
redis.call('ZADD', KEYS[2], now, id)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', forgotten)) do
  redis.call('ZREM', KEYS[2], gone)
  redis.call('HDEL', KEYS[1], gone)
  redis.call('HINCRBY', KEYS[3], 'version', 1)
end
local state = redis.call('HMGET', KEYS[3], 'version', 'epoch')
return {{1, now, state[1], state[2], redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', silent)}}
"""

# KEYS: rows, beats, state. ARGV: id, instance.
# Invariant: only the instance to which a row belongs removes it.
LEAVE = """
local known = redis.call('HGET', KEYS[1], ARGV[1])
if known and string.sub(known, 1, #ARGV[2] + 1) == ARGV[2] .. ' ' then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('ZREM', KEYS[2], ARGV[1])
  redis.call('HINCRBY', KEYS[3], 'version', 1)
end
"""

# KEYS: holders, order, seen. ARGV: id, place in the order or '', children, milliseconds of silence, an offset for the
# choice among holders, how many of the following are gone for all, ids of nodes not to be returned.
# Invariant: the place of a node in the order never changes while it downloads, and it is sent only to a node before
# it or to one that has the whole blob. So no chain of nodes that wait for each other is closed.
# Nodes are filled up as a tree: each holder, then each downloading node, feeds `children` others. With holders, rank
# r is fed by a holder if r < holders * children, else by the downloading node at floor(r / children) - holders;
# without, rank 0 fetches from upstream and r is fed by the node at floor((r - 1) / children). If all above it are
# excluded, it is fed by the first other node before it.
# Returns {place, 0} for upstream, {place, 1, holder} or {place, 2, downloading node}.
LOCATE = f"""{_NOW}
local id, children = ARGV[1], tonumber(ARGV[3])
local excluded = {{[id] = true}}
for i = 7, #ARGV do excluded[ARGV[i]] = true end
for i = 7, 6 + ARGV[6] do redis.call('SREM', KEYS[1], ARGV[i]) end
for _, late in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now - ARGV[4])) do
  if late ~= id then
    redis.call('ZREM', KEYS[2], late)
    redis.call('ZREM', KEYS[3], late)
  end
end
local place = redis.call('ZSCORE', KEYS[2], id)
if not place then
  place = ARGV[2]
  if place == '' then
    local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')
    place = string.format('%.0f', math.max(time[1] * 1000000 + time[2], (last[2] or 0) + 1))
  end
  redis.call('ZADD', KEYS[2], place, id)
end
redis.call('ZADD', KEYS[3], now, id)
redis.call('PEXPIRE', KEYS[2], ARGV[4] * 2)
redis.call('PEXPIRE', KEYS[3], ARGV[4] * 2)
local holders = {{}}
for _, holder in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  if not excluded[holder] then holders[#holders + 1] = holder end
end
table.sort(holders)
local count = #holders
local own = redis.call('ZRANK', KEYS[2], id)
local rank = own
while count > 0 or rank > 0 do
  if rank < count * children then
    return {{place, 1, holders[(rank + ARGV[5]) % count + 1]}}
  end
  if count > 0 then
    rank = math.floor(rank / children) - count
  else
    rank = math.floor((rank - 1) / children)
  end
  local parent = redis.call('ZRANGE', KEYS[2], rank, rank)[1]
  if not excluded[parent] then return {{place, 2, parent}} end
end
if own > 0 then
  for _, other in ipairs(redis.call('ZRANGE', KEYS[2], 0, math.min(own, {MAX_HOLDERS}) - 1)) do
    if not excluded[other] then return {{place, 2, other}} end
  end
end
return {{place, 0}}
"""

# KEYS: order, seen. ARGV: id, place, milliseconds of silence.
# Invariant: a node that renews keeps its place, also if the server has lost it.
RENEW = f"""{_NOW}
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3] * 2)
redis.call('PEXPIRE', KEYS[2], ARGV[3] * 2)
"""

_ADD = f"""
if redis.call('SISMEMBER', KEYS[1], ARGV[1]) == 0 then
  if redis.call('SCARD', KEYS[1]) >= {MAX_HOLDERS} then redis.call('SPOP', KEYS[1]) end
  redis.call('SADD', KEYS[1], ARGV[1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

# KEYS: holders. ARGV: id, milliseconds until all holders of a blob that none of them announces again are forgotten.
# Invariant: a set with holders never becomes empty by an addition.
ADD = _ADD

# KEYS: holders, order, seen. ARGV: id, milliseconds as above, 1 if the node has the blob now.
# Invariant: a node is a holder before it no longer downloads, so that no other node begins from upstream.
# Returns how many other nodes had the blob before.
FINISH = f"""
local others = redis.call('SCARD', KEYS[1]) - redis.call('SISMEMBER', KEYS[1], ARGV[1])
if ARGV[3] == '1' then
{_ADD}
end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
return others
"""

# KEYS: tag, lease. ARGV: id, milliseconds of the lease.
# Invariant: while a lease lasts, one node is told to ask upstream.
# Returns {1 if fresh, 1 if the node is to ask upstream, digest or false, milliseconds of age}.
GET_TAG = f"""{_NOW}
local row = redis.call('HMGET', KEYS[1], 'digest', 'at', 'until')
local age = row[2] and math.max(0, now - row[2]) or 0
if row[3] and now < tonumber(row[3]) then return {{1, 0, row[1], age}} end
local is_ours = redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2])
if not is_ours and redis.call('GET', KEYS[2]) == ARGV[1] then is_ours = true end
return {{0, is_ours and 1 or 0, row[1], age}}
"""

# KEYS: tag, lease. ARGV: id, digest or '', milliseconds for which it is fresh, and until it is forgotten.
SET_TAG = f"""{_NOW}
redis.call('HSET', KEYS[1], 'digest', ARGV[2], 'at', now, 'until', now + ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
"""

# KEYS: lease. ARGV: id.
# Invariant: only the node that has a lease gives it up.
RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""

# KEYS: limit. ARGV: milliseconds.
# Invariant: a limit is never shortened.
LIMIT = """
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], '', 'PX', ARGV[1]) end
"""

# KEYS: job. ARGV: instance, milliseconds.
# Invariant: one instance has the lease, and renewing never shortens it.
# Returns 1 if it is the caller.
LEAD = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
"""

# KEYS: holders. ARGV: ids.
REMOVE = """
redis.call('SREM', KEYS[1], unpack(ARGV))
"""
