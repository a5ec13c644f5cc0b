"""Which job is next: the rule of `deployments.engine.schedule`, and a simulation that shows that it starves none."""

import random
from itertools import pairwise

import pytest

from deployments.engine.schedule import MAX_OVERTAKEN, Full, Schedule
from deployments.engine.ticket import Phase, Ticket
from pipelines.job import Job, LoRASpec, Task

CAT = (LoRASpec(nickname="cat", identity="cat-1"),)
DOG = (LoRASpec(nickname="dog", identity="dog-1"),)


def ticket(name: str, task: Task, lora: tuple[LoRASpec, ...] = ()) -> Ticket:
    job = Job(id=name, task=task, prompt="", width=64, height=64, num_inference_steps=4, seeds=(1,), lora=lora)
    return Ticket(job, {}, progress=False)


def picture(name: str, lora: tuple[LoRASpec, ...] = ()) -> Ticket:
    return ticket(name, Task.TEXT_TO_IMAGE, lora)


def video(name: str, lora: tuple[LoRASpec, ...] = ()) -> Ticket:
    return ticket(name, Task.TEXT_TO_VIDEO, lora)


def schedule_of(*tickets: Ticket, max_images: int = 1000, preemption: bool = True) -> Schedule:
    schedule = Schedule(max_images, preemption=preemption)
    for each in tickets:
        schedule.add(each)
    return schedule


def order(schedule: Schedule, merged: tuple[LoRASpec, ...] = ()) -> list[str]:
    """The job ids in the order they are taken; each job leaves its adapters merged."""
    names = []
    while len(schedule):
        chosen = schedule.take(merged)
        merged = chosen.job.lora
        names.append(chosen.job.id)
    return names


def take_and_give_back(schedule: Schedule, merged: tuple[LoRASpec, ...] = ()) -> Ticket:
    """The next job takes a turn and gives way."""
    chosen = schedule.take(merged)
    chosen.become(Phase.RUNNING)
    schedule.give_back(chosen)
    return chosen


def test_pictures_go_before_videos_and_each_in_the_order_of_arrival() -> None:
    assert order(schedule_of(video("v1"), picture("p1"), video("v2"), picture("p2"))) == ["p1", "p2", "v1", "v2"]


def test_jobs_of_the_merged_adapter_go_first_so_that_four_adapters_cost_four_switches() -> None:
    waiting = [picture(f"{lora[0].nickname}{n}", lora) for n in range(3) for lora in (CAT, DOG)]
    assert order(schedule_of(*waiting), merged=DOG) == ["dog0", "dog1", "dog2", "cat0", "cat1", "cat2"]


@pytest.mark.parametrize("seed", range(20))
def test_twenty_pictures_over_four_adapters_cost_four_switches_however_they_come(seed: int) -> None:
    adapters = [(LoRASpec(nickname=name, identity=name),) for name in "ABCD"]
    waiting = [picture(f"{lora[0].nickname}{n}", lora) for n in range(5) for lora in adapters]
    random.Random(seed).shuffle(waiting)
    taken = [name[0] for name in order(schedule_of(*waiting))]
    assert 1 + sum(one != other for one, other in pairwise(taken)) == len(adapters)


def test_a_job_of_another_adapter_is_overtaken_so_often_and_no_more() -> None:
    schedule = schedule_of(picture("dog", DOG), *(picture(f"cat{n}", CAT) for n in range(2 * MAX_OVERTAKEN)))
    assert order(schedule, merged=CAT).index("dog") == MAX_OVERTAKEN


def test_a_video_behind_endless_pictures_gets_a_turn_after_so_many() -> None:
    schedule = schedule_of(video("v"), *(picture(f"p{n}") for n in range(2 * MAX_OVERTAKEN)))
    assert order(schedule).index("v") == MAX_OVERTAKEN


def test_a_running_video_gives_way_to_a_picture_but_not_to_a_video() -> None:
    running = video("running")
    assert not schedule_of(video("v")).should_give_way(running)
    assert schedule_of(video("v"), picture("p")).should_give_way(running)
    assert not schedule_of(picture("p"), preemption=False).should_give_way(running)


def test_a_picture_gives_way_to_nothing() -> None:
    assert not schedule_of(picture("p"), video("v")).should_give_way(picture("running"))


def test_a_video_that_gave_way_goes_on_before_another_begins() -> None:
    schedule = schedule_of(video("given way", CAT), video("other", DOG))
    assert take_and_give_back(schedule, CAT).job.id == "given way"
    schedule.add(picture("p", DOG))
    assert order(schedule) == ["p", "given way", "other"]


def test_a_full_queue_takes_no_further_picture_but_videos_which_were_counted_when_they_were_accepted() -> None:
    schedule = schedule_of(picture("p1"), picture("p2"), max_images=2)
    with pytest.raises(Full):
        schedule.add(picture("p3"))
    schedule.add(video("v"))
    schedule.take(())
    schedule.add(picture("p3"))


def test_seconds_waited_add_up_over_the_turns() -> None:
    waiting = video("v")
    schedule = schedule_of(waiting)
    for _ in range(2):
        waiting.waiting_since -= 5
        assert take_and_give_back(schedule) is waiting
    assert waiting.seconds_waited == pytest.approx(10, abs=1)


@pytest.mark.parametrize("seed", range(20))
def test_nobody_starves_under_a_load_that_never_ends(seed: int) -> None:
    """One gang with more work than it can do: between two turns of a job come at most the turns of the jobs ahead of
    it and, for each of those and its own, `MAX_OVERTAKEN` others."""
    chance = random.Random(seed)
    schedule = Schedule(1000)
    merged: tuple[LoRASpec, ...] = ()
    steps_left = {}
    patience = {}
    for turn in range(2000):
        for _ in range(chance.choice((0, 1, 2)) if len(schedule) < 12 else 0):
            make, steps = chance.choice(((picture, 1), (video, 5)))
            arrival = make(f"{turn}-{len(schedule)}", chance.choice((CAT, DOG, ())))
            steps_left[arrival] = steps
            schedule.add(arrival)
        if not len(schedule):
            continue
        older = {each: index for index, each in enumerate(schedule)}
        chosen = schedule.take(merged)
        merged = chosen.job.lora
        patience.pop(chosen, None)
        for each in schedule:
            # A video ahead takes one turn per step.
            bound = sum(steps_left[other] for other, index in older.items() if index <= older[each])
            patience.setdefault(each, (bound + 1) * (MAX_OVERTAKEN + 1))
            patience[each] -= 1
            assert patience[each] >= 0, f"{each.job.id} starves"
        steps_left[chosen] -= 1
        if steps_left[chosen]:
            chosen.become(Phase.RUNNING)
            schedule.give_back(chosen)
