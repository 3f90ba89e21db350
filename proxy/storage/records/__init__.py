"""What the index keeps besides images: policies, the meanings of tags, traffic, and the audit trail.

Each file has the rows of one subject, and bounds them.
"""
