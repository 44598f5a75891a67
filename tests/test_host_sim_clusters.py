"""What blocks of a cluster share in the host simulator: worked out by hand, and mistakes caught.

The kernels are those of csrc/host_sim/tests/primitives_cluster.cu, over clusters of two blocks of
64 threads; sections are those of the PTX ISA. On a GPU, test_host_sim.py compares them bit for bit.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.simulator

WORDS = list(range(512))
TILE = 8 * 32  # words

# Seed 0 is the fixed order; whatever is right is so in every order.
SEEDS = range(6)


@pytest.fixture(params=SEEDS)
def seeded(request, simulator):
    simulator.set_schedule(request.param)
    return simulator


def test_ranks_count_the_blocks_of_a_cluster(seeded):
    """Special registers, %cluster_ctarank and %cluster_nctarank: four blocks, two clusters."""
    out = seeded.run_primitive("cluster ranks", [0], 4 * 64)
    assert out == [rank + 16 * 2 for rank in (0, 1, 0, 1) for _ in range(64)]


def test_threads_read_the_other_blocks_shared_memory(seeded):
    """mapa, ld.shared::cluster: thread t reads the word of the other block's thread 63 - t."""
    out = seeded.run_primitive("cluster read", WORDS[:128], 128)
    assert out == [*range(127, 63, -1), *range(63, -1, -1)]


def test_threads_write_the_other_blocks_shared_memory(seeded):
    """st.shared::cluster, 16 bytes a thread; barrier.cluster shows them to that block."""
    out = seeded.run_primitive("cluster write", WORDS, 512)
    quads = [WORDS[4 * i : 4 * i + 4] for i in range(128)]
    assert out == [word for quad in (*quads[:63:-1], *quads[63::-1]) for word in quad]


def test_an_mbarrier_counts_arrivals_of_the_other_block(seeded):
    """mbarrier.arrive.release.cluster and try_wait.acquire.cluster: 64 arrivals of each block."""
    out = seeded.run_primitive("cluster arrivals", WORDS[:128], 64)
    assert out == list(range(127, 63, -1))


def test_multicast_lands_in_every_block_of_the_mask(seeded):
    """cp.async.bulk.tensor, .multicast::cluster: two tiles, one after the other, each in both."""
    out = seeded.run_primitive("multicast", WORDS, 4 * TILE)
    tile = [row * 32 + (chunk ^ row % 8) * 4 + k for row in range(8) for chunk in range(8)
            for k in range(4)]  # fmt: skip
    both = tile + [TILE + word for word in tile]
    assert out == both + both


def test_multicast_of_pixels_brings_each_blocks_half_to_both(seeded):
    """A window of 3 x 3 over 6 x 12 pixels of 32 words, its middle tap, lines 0-4 and 5-9."""
    image = list(range(72 * 32))
    out = seeded.run_primitive("multicast of pixels", image, 4 * 640)
    rows = []
    for place in range(40):
        pixel = (place // 4 + 1) * 6 + place % 4 + 1
        row = place % 20
        order = [(chunk ^ row % 8) * 4 + k for chunk in range(8) for k in range(4)]
        rows += [image[pixel * 32 + word] for word in order]
    assert out == rows + rows


def test_cluster_barriers_are_counted(simulator):
    simulator.run_primitive("cluster read", WORDS[:128], 128)
    assert simulator.take_statistics()["cluster_barriers"] == 2


NOT_STARTED = r"accesses shared memory of block rank \d, which need not have started"
NOT_READY = "initialised with no barrier between|is no mbarrier"
WAITS = "threads 0-63 wait at the mbarrier at 16384 of block rank"
# Of either block: arrivals that come too early may stand for those of the other one.
OVERWRITES = "has an asynchronous operation write|while a bulk copy .* to it is in flight"
UNSEEN = r"it reads what thread \d+ of block rank 1 wrote, with no barrier between"
FAULTS = {
    "cluster read too early": NOT_STARTED,
    "cluster read too late": "is the last of its block to exit while thread .* may still access",
    "cluster read of no address": "as an address of the cluster's shared memory, which mapa has",
    "cluster address read as an offset": "mapa has made where an offset of its own .* stands",
    "cluster read of no block": "maps an address to block rank 2 of a cluster of 2",
    "cluster write too early": NOT_STARTED,
    "cluster write not waited for": r"races for byte \d+ of shared memory of block rank \d",
    "cluster arrivals too early": f"{NOT_STARTED}|{NOT_READY}",
    "cluster arrivals missing": rf"deadlock in block \(0, 0, 0\): {WAITS} 0 \(phase 0, 64 arrivals "
    r"and 0 bytes missing\); in block \(1, 0, 0\): threads 0-63 exited",
    "cluster arrivals of a block's scope": UNSEEN,
    "cluster arrivals waited for in a block's scope": UNSEEN,
    "multicast before the other block is ready": NOT_READY,
    "multicast to one block": rf"deadlock .*; in block \(1, 0, 0\): {WAITS} 1 \(phase 0, 0 "
    r"arrivals and 1024 bytes missing\)",
    "multicast to three blocks": "multicasts to ranks 0x7 of a cluster of 2",
    "multicast released early": OVERWRITES,
    "multicast released by one block": OVERWRITES,
    "multicast without a last barrier": "whose threads have exited|is the last of its block",
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported_in_every_order(seeded, name):
    with pytest.raises(seeded.Fault, match=FAULTS[name]):
        seeded.run_primitive(name, WORDS, 4 * TILE)


@pytest.mark.parametrize("name", ["cluster read", "cluster write", "multicast"])
def test_every_cluster_barrier_is_needed(simulator, name):
    simulator.run_primitive(name, WORDS, 4 * TILE)
    barriers = simulator.take_statistics()["cluster_barriers"]
    assert barriers == 2
    for skipped in range(barriers):
        simulator.plant({"skipped_cluster_barrier": skipped})
        with pytest.raises(simulator.Fault):
            simulator.run_primitive(name, WORDS, 4 * TILE)
