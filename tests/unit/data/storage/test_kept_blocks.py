from m4train.data.storage.kept_blocks import KeptBlocks


def kept(blocks: KeptBlocks[str], count: int) -> list[int]:
    return [number for number in range(count) if blocks.get(number) is not None]


def test_two_windows_are_kept_and_the_block_used_last_longest() -> None:
    blocks: KeptBlocks[str] = KeptBlocks(window=2, pool=3)
    for number in range(4):
        blocks.add(number, f"block {number}", 10)
    assert blocks.get(0) == "block 0"
    blocks.add(4, "block 4", 10)
    assert kept(blocks, 5) == [0, 2, 3, 4]


def test_of_small_blocks_more_are_kept_as_packing_reaches_further_back() -> None:
    blocks: KeptBlocks[str] = KeptBlocks(window=2, pool=3)
    for number in range(20):
        blocks.add(number, "rows", 2)
    assert kept(blocks, 20) == list(range(14, 20))
