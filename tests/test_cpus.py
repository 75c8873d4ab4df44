"""The worker count that `auto` means, on made-up trees of /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clusterserve.cpus import Cpus, survey, usable_cpus

V2 = "30 23 0:26 {top} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "32 31 0:29 {top} {point} rw - cgroup cgroup rw,{controllers}\n"
OTHER = "23 1 8:1 / / rw - ext4 /dev/sda1 rw\nshort\n31 23 0:28 / /sys/fs/cgroup ro - tmpfs\n"


class Tree:
    """A root directory with the files of one process's /proc/self and of its cgroup mounts."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def v2(self, group: str, *, top: str = "/", point: str = "/sys/fs/cgroup", before: str = "") -> None:
        self.write("proc/self/cgroup", f"{before}0::{group}\n")
        self.write("proc/self/mountinfo", OTHER + V2.format(top=top, point=point))

    def v1(self, group: str, *, top: str = "/", controllers: str = "cpu,cpuacct") -> None:
        self.write("proc/self/cgroup", f"5:memory:/elsewhere\n4:{controllers}:{group}\nnonsense\n")
        mount = V1.format(top=top, point=f"/sys/fs/cgroup/{controllers}", controllers=controllers)
        memory = V1.format(top="/", point="/sys/fs/cgroup/memory", controllers="memory")
        self.write("proc/self/mountinfo", OTHER + memory + mount)

    def quota(self, group: str, quota: int, period: int = 100_000, controllers: str = "cpu,cpuacct") -> None:
        self.write(f"sys/fs/cgroup/{controllers}/{group}/cpu.cfs_quota_us", f"{quota}\n")
        self.write(f"sys/fs/cgroup/{controllers}/{group}/cpu.cfs_period_us", f"{period}\n")

    @property
    def cpus(self) -> int:
        return usable_cpus(str(self.root))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    affinity(monkeypatch, 8)
    return Tree(tmp_path)


def affinity(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))


def test_without_cgroups_the_affinity_decides(tree: Tree) -> None:
    assert survey(str(tree.root)) == Cpus(8, "8 usable processors")


def test_one_processor_is_said_in_the_singular(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    affinity(monkeypatch, 1)
    assert survey(str(tree.root)).explanation == "1 usable processor"


def test_on_this_machine_there_is_at_least_one_and_no_more_than_the_affinity() -> None:
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("cpu_max", "count"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("1000 100000\n", 1),
        ("100001 100000\n", 2),
        ("30000 10000\n", 3),
        ("300000\n", 3),
        ("9900000 100000\n", 8),
        ("800000 100000\n", 8),
        ("", 8),
        ("max", 8),
        ("x y\n", 8),
        ("200000 0\n", 8),
        ("200000 x\n", 8),
        ("0 100000\n", 8),
        ("-1 100000\n", 8),
        ("200000 100000 7\n", 8),
        ("9" * 5000, 8),
        ("٣ 1\n", 8),
    ],
)
def test_a_version_2_quota_is_rounded_up_and_nonsense_is_no_quota(tree: Tree, cpu_max: str, count: int) -> None:
    tree.v2("/app")
    tree.write("sys/fs/cgroup/app/cpu.max", cpu_max)
    assert tree.cpus == count


def test_the_quota_is_explained(tree: Tree) -> None:
    tree.v2("/app")
    tree.write("sys/fs/cgroup/app/cpu.max", "150000 100000")
    assert survey(str(tree.root)) == Cpus(2, "a cgroup quota of 1.5 processors")
    tree.write("sys/fs/cgroup/app/cpu.max", "50000 100000")
    assert survey(str(tree.root)) == Cpus(1, "a cgroup quota of 0.5 processor")


def test_an_ancestors_quota_counts_when_it_is_tighter(tree: Tree) -> None:
    tree.v2("/slice/service/app")
    tree.write("sys/fs/cgroup/slice/cpu.max", "200000 100000")
    tree.write("sys/fs/cgroup/slice/service/cpu.max", "max 100000")
    tree.write("sys/fs/cgroup/slice/service/app/cpu.max", "500000 100000")
    assert tree.cpus == 2


def test_siblings_and_children_do_not_count(tree: Tree) -> None:
    tree.v2("/slice/app")
    tree.write("sys/fs/cgroup/slice/other/cpu.max", "100000 100000")
    tree.write("sys/fs/cgroup/slice/app/child/cpu.max", "100000 100000")
    assert tree.cpus == 8


def test_in_a_container_with_a_cgroup_namespace_the_mount_point_is_the_group(tree: Tree) -> None:
    tree.v2("/")
    tree.write("sys/fs/cgroup/cpu.max", "300000 100000")
    assert tree.cpus == 3


def test_a_group_that_is_not_visible_leaves_its_visible_ancestors(tree: Tree) -> None:
    tree.v2("/kubepods/pod1/gone")
    tree.write("sys/fs/cgroup/cpu.max", "400000 100000")
    assert tree.cpus == 4


def test_a_process_moved_in_from_another_namespace(tree: Tree) -> None:
    tree.v2("/../../outside")
    tree.write("sys/fs/cgroup/cpu.max", "200000 100000")
    tree.write("outside/cpu.max", "100000 100000")
    assert tree.cpus == 2


def test_a_mount_point_with_a_space(tree: Tree) -> None:
    tree.v2("/app", point="/my\\040cgroups")
    tree.write("my cgroups/app/cpu.max", "200000 100000")
    assert tree.cpus == 2


def test_a_mount_point_that_no_file_can_have_sets_no_limit(tree: Tree) -> None:
    tree.v2("/app", point="/a\\000b")
    assert tree.cpus == 8


@pytest.mark.parametrize("controllers", ["cpu,cpuacct", "cpuacct,cpu", "cpu"])
def test_a_version_1_quota_by_whatever_name_the_controller_is_mounted(tree: Tree, controllers: str) -> None:
    tree.v1("/app", controllers=controllers)
    tree.quota("app", 250_000, controllers=controllers)
    assert tree.cpus == 3


def test_version_1_without_a_quota_and_with_nonsense(tree: Tree) -> None:
    tree.v1("/app")
    tree.quota("app", -1)
    assert tree.cpus == 8
    tree.write("sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us", "many")
    assert tree.cpus == 8


def test_a_version_1_ancestor(tree: Tree) -> None:
    tree.v1("/a/b")
    tree.quota("", -1)
    tree.quota("a", 200_000)
    tree.quota("a/b", 600_000)
    assert tree.cpus == 2


def test_version_1_in_a_container_where_only_its_own_group_is_mounted(tree: Tree) -> None:
    tree.v1("/docker/abc", top="/docker/abc")
    tree.quota("", 200_000)
    assert tree.cpus == 2


def test_a_group_below_the_mounted_one(tree: Tree) -> None:
    tree.v1("/docker/abc/inner", top="/docker/abc")
    tree.quota("", 500_000)
    tree.quota("inner", 200_000)
    assert tree.cpus == 2


def test_a_group_outside_the_mounted_one_leaves_the_mount_point(tree: Tree) -> None:
    tree.v1("/elsewhere", top="/docker/abc")
    tree.quota("", 300_000)
    tree.quota("elsewhere", 100_000)
    assert tree.cpus == 3


def test_the_tighter_version_of_a_hybrid_system(tree: Tree) -> None:
    tree.v2("/user", point="/sys/fs/cgroup/unified", before="4:cpu,cpuacct:/app\n1:name=systemd:/user\n")
    mounts = V1.format(top="/", point="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct")
    tree.write("proc/self/mountinfo", mounts + V2.format(top="/", point="/sys/fs/cgroup/unified"))
    tree.quota("app", 200_000)
    assert tree.cpus == 2
    tree.write("sys/fs/cgroup/unified/user/cpu.max", "100000 100000")
    assert tree.cpus == 1


def test_a_mount_of_a_version_this_process_is_not_in(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "")
    tree.write("proc/self/mountinfo", V2.format(top="/", point="/sys/fs/cgroup"))
    tree.write("sys/fs/cgroup/cpu.max", "100000 100000")
    assert tree.cpus == 8


@pytest.mark.parametrize("garbage", [b"\xff\xfe\x00", b"", b"\n\n::::\n", b" - \n - - \n0::\n"])
def test_garbage_in_proc_sets_no_limit(tree: Tree, garbage: bytes) -> None:
    tree.write("proc/self/cgroup", "")
    (tree.root / "proc/self/cgroup").write_bytes(garbage)
    (tree.root / "proc/self/mountinfo").write_bytes(garbage)
    assert tree.cpus == 8


def test_a_directory_where_a_file_should_be(tree: Tree) -> None:
    tree.v2("/app")
    (tree.root / "sys/fs/cgroup/app/cpu.max").mkdir(parents=True)
    assert tree.cpus == 8
