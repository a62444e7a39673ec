"""Pages: who has them, who may share them, and that none is lost or given twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.engine.pages import PagePool, block_key

KEYS = [bytes([i]) for i in range(6)]


def test_a_page_is_given_once_until_it_comes_back():
    pool = PagePool(4)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert (pool.allocate(1), pool.used) == (None, 4)
    pool.release(first)
    assert sorted(pool.allocate(3)) == sorted(first)


def test_a_page_that_nobody_uses_cannot_come_back():
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="nobody uses it"):
        pool.release(pages)


def test_a_prefix_is_found_as_far_as_it_goes():
    pool = PagePool(8)
    pages = pool.allocate(3)
    for page, key in zip(pages, KEYS[:3], strict=True):
        pool.register(page, key)
    shared, found = pool.claim([*KEYS[:2], b"other"], 4)
    assert (shared[:2], found) == (pages[:2], 2)
    pool.release(pages)
    assert pool.cached == 1  # the two that are shared are in use
    assert pool.claim([KEYS[1]], 1)[1] == 1  # by key alone: a chain is the caller's matter
    again, found = pool.claim(KEYS[:3], 3)
    assert (again, found, pool.cached) == (pages, 3, 0)


def test_what_was_used_last_is_taken_last():
    pool = PagePool(3)
    pages = pool.allocate(3)
    for page, key in zip(pages, KEYS[:3], strict=True):
        pool.register(page, key)
    pool.release([pages[1]])
    pool.release([pages[0]])
    pool.release([pages[2]])
    pool.claim([KEYS[1]], 1)
    pool.release([pages[1]])
    assert [pool.allocate(1)[0] for _ in range(3)] == [pages[0], pages[2], pages[1]]


def test_of_one_row_the_end_is_taken_before_the_beginning():
    pool = PagePool(3)
    pages = pool.allocate(3)
    for page, key in zip(pages, KEYS[:3], strict=True):
        pool.register(page, key)
    pool.release(pages)
    pool.allocate(1)
    assert pool.claim(KEYS[:3], 3) is None
    assert pool.claim(KEYS[:2], 2) == (pages[:2], 2)


def test_pages_without_a_key_are_taken_first():
    pool = PagePool(2)
    pages = pool.allocate(2)
    pool.register(pages[0], KEYS[0])
    pool.release([pages[0]])
    pool.release([pages[1]])
    assert pool.allocate(1) == [pages[1]]


def test_found_pages_do_not_count_as_free_ones():
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.register(pages[0], KEYS[0])
    pool.release(pages)
    assert pool.claim([KEYS[0]], 4) is None
    assert pool.claim([KEYS[0]], 3, spare=1) is None
    assert (pool.used, pool.cached) == (0, 1)
    assert pool.claim([KEYS[0]], 2, spare=1)[1] == 1


def test_forgotten_pages_are_not_found():
    pool = PagePool(2)
    pages = pool.allocate(2)
    for page, key in zip(pages, KEYS[:2], strict=True):
        pool.register(page, key)
    pool.release([pages[0]])
    pool.forget(pages)
    assert pool.claim(KEYS[:1], 1)[1] == 0
    assert pool.cached == 0


def test_the_same_text_twice_is_found_in_the_first_page():
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.register(first, KEYS[0])
    pool.register(second, KEYS[0])
    pool.release([first, second])
    assert pool.claim([KEYS[0]], 1) == ([first], 1)


def test_a_pool_that_grows_keeps_what_it_has():
    pool = PagePool(1)
    (page,) = pool.allocate(1)
    pool.register(page, KEYS[0])
    pool.release([page])
    pool.grow(3)
    assert sorted(pool.allocate(2)) == [1, 2]
    assert pool.claim([KEYS[0]], 1) == ([page], 1)


def test_a_key_is_of_everything_up_to_the_end_of_the_page():
    key = block_key(b"", [1, 2])
    others = [
        block_key(b"", [1, 3]),
        block_key(b"", [1, 2], b"picture"),
        block_key(key, [1, 2]),
        block_key(b"", [1, 2, 0]),
    ]
    assert len({key, *others}) == 5
    assert block_key(key, [5]) == block_key(block_key(b"", (1, 2)), [5])


@given(
    st.integers(1, 8),
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.lists(st.integers(0, 3), max_size=3)),
        max_size=60,
    ),
)
def test_no_page_is_lost_or_has_two_owners(size, actions):
    """Random claims, allocations, releases and registrations, against a plain model."""
    pool, held = PagePool(size), []
    owners: dict[int, int] = {}
    content: dict[bytes, int] = {}  # what was last registered under a key
    for kind, count, keys in actions:
        wanted = [KEYS[k] for k in keys][:count]
        free = size - len(owners)
        if kind == 0:
            pages = pool.allocate(count)
            assert (pages is None) == (count > free)
            fresh = pages or []
        elif kind == 1:
            claimed = pool.claim(wanted, count)
            pages, found = claimed or (None, 0)
            fresh = (pages or [])[found:]
            for page, key in zip((pages or [])[:found], wanted, strict=False):
                assert content[key] == page
        elif held:
            pages, fresh = held.pop(count % len(held)), []
            for page, key in zip(pages, wanted, strict=False):
                pool.register(page, key)
                if key not in content and page not in content.values():
                    content[key] = page
            pool.release(pages)
            for page in pages:
                owners[page] -= 1
                if not owners[page]:
                    del owners[page]
            pages = None
        else:
            continue
        assert not set(fresh) & set(owners), "given while in use"
        content = {key: page for key, page in content.items() if page not in fresh}
        if pages is not None:
            held.append(pages)
            for page in pages:
                owners[page] = owners.get(page, 0) + 1
        assert pool.used == len(owners)
        assert pool.cached == sum(page not in owners for page in content.values())
    for pages in held:
        pool.release(pages)
    assert (pool.used, len(pool.allocate(size))) == (0, size)
