"""The emulation that checks the CUDA kernels, checked: every planted bug is reported, and its correct twin is not."""

from __future__ import annotations

import subprocess

import emulator
import pytest

pytestmark = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs g++ on Linux")


def run(kernel: str, sanitizer: str, order: str = "forward") -> subprocess.CompletedProcess[str]:
    program = emulator.build_program("planted_bugs", sanitizer)
    environment = emulator.environment(CUDA_ON_CPU_ORDER=order)
    return subprocess.run([str(program), kernel], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("order", ["forward", "shuffled"])
@pytest.mark.parametrize(
    ("kernel", "result"),
    [
        ("reduction", "64"),
        ("kept_tile", "2"),
        ("warp_barrier", "31"),
        ("blocks_add_integers", "6"),
        ("last_block_sums", "6"),
        ("within_dynamic", "0.5"),
        ("written_shared", "64"),
        ("all_outputs", "2"),
        ("matrix_product", "16"),
        ("copied", "1.5"),
        ("product_by_warpgroup", "3648"),
    ],
)
def test_correct_kernels_pass(kernel, result, order, sanitizer):
    done = run(kernel, sanitizer, order)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == result


@pytest.mark.parametrize(
    ("bug", "sanitizer", "report"),
    [
        ("missing_barrier", "thread", "data race"),
        ("overwritten_tile", "thread", "data race"),
        ("shuffle_as_barrier", "thread", "data race"),
        ("divergent_barrier", "address", "different barriers"),
        ("divergent_shuffle", "address", "not every thread"),
        ("blocks_share_a_sum", "thread", "data race"),
        ("missing_fence", "thread", "data race"),
        ("missing_second_fence", "thread", "data race"),
        ("fence_before_the_write", "thread", "data race"),
        ("beyond_the_end", "address", "heap-buffer-overflow"),
        ("misaligned_pack", "address", "misaligned address"),
        ("beyond_shared", "address", "index 64 out of bounds"),
        ("beyond_dynamic", "address", "heap-buffer-overflow"),
        ("matrix_before_barrier", "thread", "data race"),
        ("misaligned_matrix", "address", "misaligned row of a matrix"),
        ("matrix_outside_shared", "address", "not in shared memory"),
        ("matrix_of_half_a_warp", "address", "not every thread"),
        ("copy_without_barrier", "thread", "data race"),
        ("misaligned_copy", "address", "misaligned copy"),
        ("copy_outside_shared", "address", "a copy not to shared memory"),
        ("product_without_fence", "address", "without wgmma.fence since the last wait"),
        ("product_without_second_fence", "address", "without wgmma.fence since the last wait"),
        ("product_without_proxy_fence", "address", "not been shown to the products"),
        ("product_before_barrier", "thread", "data race"),
        ("product_of_half_a_warpgroup", "address", "not every thread"),
        ("product_with_touched_sums", "address", "sums were touched"),
        ("product_of_what_is_overwritten", "address", "written while a product may read it"),
        ("product_of_what_is_copied_over", "address", "written while a product may read it"),
        ("product_of_what_is_copied_over", "thread", "data race"),
    ],
)
def test_planted_bugs_are_reported(bug, sanitizer, report):
    done = run(bug, sanitizer)
    assert done.returncode not in (0, 3)
    assert report in done.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_what_nobody_wrote_shows(sanitizer):
    """Shared memory and outputs hold NaN until they are written."""
    assert run("unwritten_shared", sanitizer).stdout.split()[0].strip("-") == "nan"
    assert run("all_outputs", sanitizer).stdout.split()[1] == "0"
    assert run("unwritten_output", sanitizer).stdout.split()[1] == "1"
    # A copy is there when it was waited for and not before, and what it overwrites is gone when it is asked for.
    assert run("copy_not_waited_for", sanitizer).stdout.split()[0].strip("-") == "nan"
    assert run("copy_over_what_is_read", sanitizer).stdout.split()[0].strip("-") == "nan"


def test_wrong_products_show():
    """A product is made at its wait, of what its descriptor says: until then sums are unknown."""
    results = {
        bug: float(run(f"product_{bug}", "address").stdout.split()[0])
        for bug in (
            "by_warpgroup",
            "not_waited_for",
            "not_committed",
            "of_another_swizzle",
            "of_another_stride",
            "of_another_place",
            "of_unaligned_memory",
        )
    }
    assert results.pop("by_warpgroup") == 2 * 32 * 57
    assert 2 * 32 * 57 not in results.values(), results


def test_an_order_of_blocks_shows():
    """A sum by atomics in float64 races with nothing, and still depends on who comes first."""
    results = {
        order: run("blocks_add_in_any_order", "thread", order).stdout.split()[0] for order in ("forward", "reverse")
    }
    assert results == {"forward": "0", "reverse": "1"}
