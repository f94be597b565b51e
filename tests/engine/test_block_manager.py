"""The block manager against a model of it that does everything the slow way."""

import numpy as np
import pytest

from thyme.engine.block_manager import BlockManager


class Colliding(bytes):
    """Contents whose hashes all collide."""

    def __hash__(self) -> int:
        return 7


def walk(operations: int, seed: int, check_every: int = 50, num_blocks: int = 24) -> int:
    """Random sequences that begin, grow, fork, end; returns how often a prefix was found."""
    draw = np.random.default_rng(seed)
    blocks = BlockManager(num_blocks, 4)
    tables: list[list[int]] = []
    paths: list[tuple[int, int, list[bytes]]] = []  # of each table: weights, node, contents of its published blocks
    written: dict[int, tuple[int, tuple[bytes, ...]]] = {}  # block -> weights and prefix that are in it
    found = weights = 0
    for step in range(operations):
        action = 0.9 if len(tables) > 10 else draw.random()  # 0.9: the end of one, so that blocks stay in motion
        if action < 0.35:
            node, table, path = blocks.root, [], []
            while True:  # begin with whatever prefix there is
                content = bytes([int(draw.integers(2))])
                hit = blocks.find(node, content)
                if hit is None:
                    break
                block, node = hit
                path.append(content)
                assert written[block] == (weights, tuple(path)), "found a block of another prefix"
                blocks.share(block)
                table.append(block)
                found += 1
            tables.append(table)
            paths.append((weights, node, path))
        elif tables:
            i = int(draw.integers(len(tables)))
            table, (version, node, path) = tables[i], paths[i]
            if action < 0.65 and blocks.num_free:
                block = blocks.allocate()
                assert not any(block in other for other in tables), "allocated a block that is held"
                table.append(block)
                if len(path) == len(table) - 1:  # full, and all before it published
                    path.append(bytes([int(draw.integers(2))]))
                    written[block] = version, tuple(path)
                    paths[i] = (version, blocks.publish(block, node, path[-1]), path)
            elif action < 0.75:
                for block in table:
                    blocks.share(block)
                tables.append(list(table))
                paths.append((version, node, list(path)))
            elif action < 0.99:
                blocks.release(reversed(table))
                del tables[i], paths[i]
            else:
                blocks.forget_prefixes()
                weights += 1
        if step % check_every == 0:
            blocks.check_integrity(tables)
            for block in range(num_blocks):
                assert blocks.is_shared(block) == (sum(table.count(block) for table in tables) > 1)
    for table in tables:
        blocks.release(reversed(table))
    blocks.check_integrity([])
    assert blocks.num_free == num_blocks
    return found


def test_random_walk() -> None:
    assert walk(10_000, seed=0) > 500


@pytest.mark.soak
def test_long_random_walk() -> None:
    for seed in range(10):
        assert walk(100_000, seed=seed, check_every=500) > 5000


def test_equal_hashes_are_not_equal_prefixes() -> None:
    blocks = BlockManager(4, 4)
    first = blocks.allocate()
    node = blocks.publish(first, blocks.root, Colliding(b"abcd"))
    assert blocks.find(blocks.root, Colliding(b"abcx")) is None
    assert blocks.find(blocks.root, Colliding(b"abcd")) == (first, node)
    assert blocks.find(node, Colliding(b"abcd")) is None, "the same tokens after another prefix"
    blocks.release([first])


def test_reuse_takes_unpublished_blocks_first_and_then_the_longest_free() -> None:
    blocks = BlockManager(3, 4)
    a, b, c = blocks.allocate(), blocks.allocate(), blocks.allocate()
    blocks.publish(a, blocks.root, b"a")
    blocks.publish(b, blocks.root, b"b")
    for block in (a, b, c):
        blocks.release([block])
    assert [blocks.allocate(), blocks.allocate()] == [c, a]
    assert blocks.find(blocks.root, b"a") is None
    assert blocks.find(blocks.root, b"b") is not None


def test_a_free_block_with_a_prefix_is_found_and_held_again() -> None:
    blocks = BlockManager(2, 4)
    a = blocks.allocate()
    node = blocks.publish(a, blocks.root, b"a")
    blocks.release([a])
    assert blocks.find(blocks.root, b"a") == (a, node)
    blocks.share(a)
    assert blocks.num_free == 1
    assert blocks.allocate() != a


def test_an_equal_block_keeps_the_first_findable() -> None:
    blocks = BlockManager(3, 4)
    a, b, c = blocks.allocate(), blocks.allocate(), blocks.allocate()
    node = blocks.publish(a, blocks.root, b"x")
    assert blocks.publish(b, blocks.root, b"x") == node
    after = blocks.publish(c, node, b"y")  # what follows the copy is found behind the first
    assert blocks.find(node, b"y") == (c, after)
    assert blocks.find(blocks.root, b"x") == (a, node)


@pytest.mark.parametrize("tables", [[[0]], [[0, 1], [1, 2]], [[0, 1, 2]]])
def test_integrity_check_sees_wrong_counts(tables: list[list[int]]) -> None:
    blocks = BlockManager(4, 4)
    held = [blocks.allocate(), blocks.allocate()]
    blocks.check_integrity([held])
    with pytest.raises(RuntimeError, match="miscounted"):
        blocks.check_integrity(tables)


def test_releasing_too_often_is_our_bug() -> None:
    blocks = BlockManager(1, 4)
    block = blocks.allocate()
    blocks.release([block])
    with pytest.raises(AssertionError, match="more often"):
        blocks.release([block])


def test_forgotten_blocks_are_reused_before_those_nobody_has_had() -> None:
    """Their memory is there already; in order, so that a prompt's lie side by side."""
    blocks = BlockManager(8, 4)
    held = [blocks.allocate() for _ in range(4)]
    node = blocks.root
    for block in held:
        node = blocks.publish(block, node, b"abcd")
    blocks.release(reversed(held[1:]))
    blocks.forget_prefixes()
    blocks.check_integrity([held[:1]])
    assert [blocks.allocate() for _ in range(4)] == [1, 2, 3, 4]
