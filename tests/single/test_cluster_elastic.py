"""The decisions of the elastic driver, played through second by second; real runs are in tests/parallel."""

from __future__ import annotations

from typing import Any

from hvdlm.cluster.elastic.members import Policy
from hvdlm.cluster.elastic.roster import Roster

POLICY = Policy(first_workers=2, start_wait_s=60)
NEW = {"generation": 0, "waiting": True, "prepared": False, "lost": False, "step": -1}


class Play:
    """Hosts and workers that do what they are told, in a time of their own."""

    def __init__(self, policy: Policy = POLICY, *, job: str = "") -> None:
        self.now_s = 100.0
        self.roster = Roster(policy, job=job, now_s=self.now_s)
        self.hosts: dict[str, dict[str, Any]] = {}
        self.workers: dict[str, dict[str, Any]] = {}
        self.stuck: set[str] = set()

    def add(self, host: str, slots: int = 1, job: str = "") -> None:
        self.hosts[host] = {"agent": f"{host}-0", "host": host, "slots": slots, "job": job, "leaving": ""}
        self.hosts[host]["exited"] = {}

    def beat(self, seconds: float = 1.0, *, silent: tuple[str, ...] = ()) -> None:
        """Everybody speaks, half a second apart; who is silent does not."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.5
            for name in [*self.hosts]:
                if name not in silent:
                    self._beat_host(name)
            for name in [*self.workers]:
                if name in self.workers and name.partition("-")[0] not in silent:
                    self._beat_worker(name)
            self.roster.look(self.now_s)

    def _beat_host(self, name: str) -> None:
        host = self.hosts[name]
        answer = self.roster.hear_agent(host, self.now_s)
        host["exited"] = {}
        for worker in answer["run"]:
            new = {
                "worker": worker,
                "generation": 0,
                "waiting": True,
                "prepared": False,
                "lost": False,
                "step": -1,
            }
            self.workers.setdefault(worker, new)
        if answer["end"]:
            del self.hosts[name]

    def _beat_worker(self, name: str) -> None:
        worker = self.workers[name]
        answer = self.roster.hear_worker(worker, self.now_s)
        if name in self.stuck:
            return
        if answer["leave"]:
            self.end(name, 0)
        elif answer["place"]:
            worker |= {"waiting": False, "lost": False, "prepared": True}
            worker |= {"generation": answer["place"]["generation"]}
            worker |= {"rank": answer["place"]["rank"], "step": max(0, answer["place"]["step"])}
        elif not worker["waiting"] and answer["stop"]:
            self.end(name, 75)
        elif not worker["waiting"] and answer["resize"]:
            worker |= {"waiting": True, "prepared": False}
        elif not worker["waiting"]:
            worker["step"] += 1

    def end(self, name: str, code: int) -> None:
        """A worker's process ends; its host will say so."""
        del self.workers[name]
        self.hosts[name.partition("-")[0]]["exited"][name] = code

    def lose_contact(self) -> None:
        """What the survivors of a broken world do."""
        for worker in self.workers.values():
            worker |= {"waiting": True, "prepared": False, "lost": True}

    def training(self) -> set[str]:
        """Hosts of the workers that train."""
        return {name.partition("-")[0] for name, w in self.workers.items() if not w["waiting"]}


def test_the_first_world_waits_for_all_that_are_expected() -> None:
    play = Play()
    play.add("a")
    play.beat(5)
    assert play.roster.generation == 0
    play.add("b")
    play.beat(2)
    assert play.roster.generation == 1
    assert play.training() == {"a", "b"}
    assert sorted(w["rank"] for w in play.workers.values()) == [0, 1]


def test_it_does_not_wait_forever() -> None:
    play = Play()
    play.add("a")
    play.beat(70)
    assert play.training() == {"a"}


def test_joiners_are_taken_in_together_after_a_while() -> None:
    play = Play()
    play.add("a")
    play.add("b")
    play.beat(5)
    play.add("c")
    play.beat(1)
    play.add("d")
    play.beat(1)
    assert play.roster.generation == 1
    play.beat(3)
    assert play.roster.generation == 2
    assert play.training() == {"a", "b", "c", "d"}


def test_the_newest_memory_gives_to_all() -> None:
    play = Play()
    play.add("a")
    play.add("b")
    play.beat(5)
    behind, ahead = sorted(play.workers)
    play.workers[ahead]["step"] = play.workers[behind]["step"] + 1
    newest = play.workers[ahead]["step"]
    play.lose_contact()
    play.beat(1)
    assert play.roster.generation == 2
    assert play.workers[ahead]["rank"] == 0
    assert {w["step"] for w in play.workers.values()} >= {newest}


def test_a_world_waits_for_who_has_not_come_back_yet() -> None:
    """One survivor hears of a loss at once, the other when Gloo's time is over."""
    play = Play(Policy(first_workers=3))
    for host in "abc":
        play.add(host)
    play.beat(5)
    dead, late, early = sorted(play.workers)
    play.end(dead, -9)
    play.workers[early] |= {"waiting": True, "lost": True}
    play.stuck.add(late)
    play.beat(4)
    assert play.roster.generation == 1
    play.stuck.clear()
    play.workers[late]["waiting"] = True
    play.beat(1)
    assert play.roster.generation == 2


def test_a_lost_host_is_missed_sooner_where_a_world_broke() -> None:
    play = Play()
    play.add("a")
    play.add("b")
    play.beat(5)
    play.beat(8, silent=("b",))
    assert "b-0" in play.roster.agents
    play.beat(3, silent=("b",))
    assert "b-0" not in play.roster.agents

    play = Play()
    play.add("a")
    play.add("b")
    play.beat(5)
    play.lose_contact()
    play.beat(4, silent=("b",))
    assert play.training() == {"a"}
    assert "host b is lost" in play.roster.news


def test_a_dead_worker_is_started_again_ever_later() -> None:
    play = Play()
    play.add("a")
    play.add("b")
    waits = []
    for _ in range(3):
        play.beat(5)
        (name,) = [name for name in play.workers if name.startswith("b")]
        play.end(name, 1)
        play.lose_contact()
        begun_s = play.now_s
        while not any(name.startswith("b") for name in play.workers):
            play.beat(0.5)
        waits.append(play.now_s - begun_s)
    assert waits[0] >= 4.5
    assert waits[1] >= 2 * waits[0] - 1
    assert waits[2] >= 2 * waits[1] - 1


def test_a_host_of_another_job_leaves_and_one_of_the_own_ends_all() -> None:
    play = Play(job="7")
    play.add("a", job="7")
    play.add("b", job="8")
    play.beat(5)
    play.hosts["b"]["leaving"] = "signal SIGTERM"
    play.beat(4)
    assert play.training() == {"a"}
    assert "b" not in play.hosts
    assert play.roster.end_code is None
    play.hosts["a"]["leaving"] = "signal SIGUSR2"
    play.beat(4)
    assert play.roster.stop_reason == "signal SIGUSR2 on a"
    assert play.roster.end_code == 75
    assert not play.hosts


def test_the_last_host_does_not_leave_without_a_checkpoint() -> None:
    play = Play(Policy(first_workers=1))
    play.add("a", job="8")
    play.beat(5)
    play.hosts["a"]["leaving"] = "signal SIGTERM"
    play.beat(4)
    assert play.roster.end_code == 75


def test_a_stop_while_a_world_is_broken_saves_first() -> None:
    play = Play()
    play.add("a")
    play.add("b")
    play.beat(5)
    (dead,) = [name for name in play.workers if name.startswith("b")]
    play.end(dead, -9)
    play.lose_contact()
    play.roster.stop("signal SIGTERM")
    play.beat(1.5)
    assert play.roster.generation == 2
    play.beat(3)
    assert play.roster.end_code == 75


def test_a_drained_node_leaves_where_others_stay() -> None:
    play = Play(job="7")
    play.add("a", job="7")
    play.add("b", job="7")
    play.beat(5)
    play.roster.drain({"b"}, "its node is being drained")
    play.beat(4)
    assert play.training() == {"a"}
    play.roster.drain({"a"}, "its node is being drained")
    play.beat(4)
    assert play.training() == {"a"}


def test_the_end_of_one_is_the_end_of_all() -> None:
    play = Play()
    play.add("a")
    play.add("b")
    play.beat(5)
    for name in [*play.workers]:
        play.end(name, 0)
    play.beat(2)
    assert play.roster.end_code == 0
    assert not play.hosts


def test_worlds_that_fail_at_the_same_step_end_the_run() -> None:
    play = Play(Policy(first_workers=2, most_failures=3, longest_wait_s=1))
    play.add("a")
    play.add("b")
    for _ in range(3):
        play.beat(8)
        for name in [*play.workers]:
            play.end(name, -6)
        play.beat(1)
    assert play.roster.end_code == 1


def test_a_refused_joiner_does_no_harm() -> None:
    """Its node lacks the data, say: exit code 2 before it was in any world."""
    play = Play(Policy(first_workers=1))
    play.add("a")
    play.beat(5)
    play.add("b")
    play.beat(0.5)
    (name,) = [name for name in play.workers if name.startswith("b")]
    play.end(name, 2)
    play.beat(5)
    assert play.training() == {"a"}
    assert play.roster.end_code is None


def test_a_stranger_is_sent_away() -> None:
    play = Play()
    message = {
        "worker": "x-0.0.1",
        "generation": 0,
        "waiting": True,
        "prepared": False,
        "lost": False,
        "step": 1,
    }
    assert play.roster.hear_worker(message, play.now_s)["leave"]


def test_horovod_starts_when_all_are_prepared() -> None:
    """One that is slow to come would end those that have begun."""
    play = Play()
    play.add("a")
    play.add("b")
    play.beat(1)
    one, other = sorted(play.workers)
    assert play.roster.generation == 1
    early, late = play.workers[one], play.workers[other]
    assert not play.roster.hear_worker(late | {"prepared": False}, play.now_s)["go"]
    assert not play.roster.hear_worker(early, play.now_s)["go"]
    assert play.roster.hear_worker(late, play.now_s)["go"]
    assert play.roster.hear_worker(early, play.now_s)["go"]
    play.end(other, -9)
    play._beat_host("b")
    assert play.roster.hear_worker(early, play.now_s)["broken"]
