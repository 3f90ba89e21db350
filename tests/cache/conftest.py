"""What several tests of the cache begin with."""

import pytest

HOUR = 3600


@pytest.fixture
async def pulled(registry, program):
    """An image whose tag is in the cache and has expired."""
    image = registry.add_image()
    await program.manifest(image)
    program.clock.turn(HOUR)
    registry.requests.clear()
    return image
