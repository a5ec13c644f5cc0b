from lora.cache import LRUCache


def cache(max_bytes: int, **values: bytes) -> LRUCache[str, bytes]:
    made: LRUCache[str, bytes] = LRUCache(max_bytes, len)
    for key, value in values.items():
        made.put(key, value)
    return made


def test_the_least_recently_used_goes_first() -> None:
    held = cache(3, a=b"1", b=b"2", c=b"3")
    assert held.get("a") == b"1"
    held.put("d", b"4")
    assert held.get("b") is None
    assert [held.get(key) for key in "acd"] == [b"1", b"3", b"4"]
    assert held.num_bytes == 3


def test_one_big_value_takes_the_place_of_several() -> None:
    held = cache(3, a=b"1", b=b"2", c=b"3")
    held.put("d", b"456")
    assert len(held) == 1
    assert "d" in held


def test_a_value_larger_than_the_budget_stays_until_the_next_one_comes() -> None:
    held = cache(3, a=b"1234")
    assert held.get("a") == b"1234"
    held.put("b", b"5")
    assert held.get("a") is None
    assert held.num_bytes == 1


def test_a_value_larger_than_the_budget_can_be_pinned_after_it_was_put() -> None:
    held = cache(3, a=b"1234")
    held.pin({"a"})
    held.put("b", b"5")
    assert held.get("a") == b"1234"


def test_pinned_values_stay_even_over_the_budget() -> None:
    held = cache(2)
    held.pin({"a", "b"})
    held.put("a", b"123")
    held.put("b", b"456")
    held.put("c", b"7")
    held.put("d", b"8")
    assert [key in held for key in "abcd"] == [True, True, False, True]


def test_pinning_others_frees_what_was_pinned_before() -> None:
    held = cache(2)
    held.pin({"a"})
    held.put("a", b"123")
    held.pin(set())
    assert "a" not in held
    assert held.num_bytes == 0


def test_putting_a_key_again_replaces_its_value_and_size() -> None:
    held = cache(9, a=b"123")
    held.put("a", b"4")
    assert held.get("a") == b"4"
    assert held.num_bytes == 1


def test_discarding_frees_and_ignores_what_is_not_held() -> None:
    held = cache(9, a=b"123")
    held.discard("a")
    held.discard("a")
    assert held.num_bytes == 0
