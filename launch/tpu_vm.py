"""Trains on a TPU VM, or on all hosts of a slice of TPU VMs, by gcloud.

    python launch/tpu_vm.py create  --zone=Z --accelerator=v5p-128
    python launch/tpu_vm.py install --zone=Z
    python launch/tpu_vm.py start   --zone=Z --accelerator=v5p-128 -- \\
        --config=experiments/F.py --workdir=gs://B/W
    python launch/tpu_vm.py follow  --zone=Z
    python launch/tpu_vm.py stop    --zone=Z

`create` asks for a queued resource and its one node, both called --name. `install`
copies the package, the experiments and the launchers to ~/sae_jax of each host, and
makes ~/sae_jax/.venv there. `start` begins the run on each host, under launch/local.py,
and returns: the processes find each other, and each host starts its own again when it
is to be. `follow` shows what host 0 prints, to the end of the run. `stop` has the run
saved and ended, and returns when it is; `start` goes on from there. Without --project
and --zone, gcloud's own settings count.

Several hosts need ssh-agent: `ssh-add ~/.ssh/google_compute_engine` first.
"""

import sys

import settings
from absl import flags
from slices import ACCELERATOR, SPOT, read_slice

_PROJECT = flags.DEFINE_string("project", None, "the project of the TPUs")
_ZONE = flags.DEFINE_string("zone", None, "the zone of the TPUs")
_RUNTIME = flags.DEFINE_string(
    "runtime_version", None, "software of the hosts; by default the generation's own"
)
_ARCHIVE = "sae_jax.tar.gz"
_ARCHIVED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE") + (
    "sae_jax",
    "experiments",
    "launch",
)
# After a reboot another program may have the number.
_IS_RUNNING = 'grep -aqs launch/local.py "/proc/$(cat run.pid)/cmdline"'
# What the account's shell runs on each host, in its home.
_INSTALL = f"""set -e
mkdir -p sae_jax
tar -xzf {_ARCHIVE} -C sae_jax
cd sae_jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --clear --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'"""
_START = f"""set -e
cd sae_jax
if [ -s run.pid ] && {_IS_RUNNING}; then
  echo "a run is under way: stop it first" >&2
  exit 1
fi
trap "" HUP
{{command}} >run.log 2>&1 </dev/null &
echo $! >run.pid"""
_FOLLOW = """set -e
cd sae_jax
tail -n 100 -F --pid="$(cat run.pid)" run.log"""
_STOP = f"""set -e
cd sae_jax
pid=$(cat run.pid)
if {_IS_RUNNING} && kill -TERM "$pid"; then tail -f --pid="$pid" /dev/null; fi
tail -n 1 run.log"""


def main(words: list[str], arguments: list[str]) -> int:
    """Does the one action that is asked for."""
    actions = {
        "create": _create,
        "install": _install,
        "start": lambda: _start(arguments),
        "follow": lambda: settings.execute(_ssh(_FOLLOW, "0")),
        "stop": lambda: settings.execute(_ssh(_STOP)),
    }
    if len(words) != 1 or words[0] not in actions:
        raise ValueError(f"say what to do, one of {', '.join(actions)}")
    if arguments and words[0] != "start":
        raise ValueError(f"{words[0]} trains nothing: leave out {arguments[0]}")
    return actions[words[0]]()


def _create() -> int:
    runtime = _RUNTIME.value or read_slice().generation.runtime
    return settings.execute([
        *"gcloud compute tpus queued-resources create".split(),
        settings.NAME.value,
        *_where(),
        f"--node-id={settings.NAME.value}",
        f"--accelerator-type={ACCELERATOR.value}",
        f"--runtime-version={runtime}",
        *(["--spot"] if SPOT.value else []),
    ])


def _install() -> int:
    archive = settings.ROOT / "build" / _ARCHIVE
    pack = ["tar", "-czf", str(archive), "--exclude=__pycache__"]
    pack += ["-C", str(settings.ROOT), *_ARCHIVED]
    copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(archive)]
    copy += [f"{settings.NAME.value}:", *_where(), "--worker=all"]
    make_folder = ["mkdir", "-p", str(archive.parent)]
    return settings.execute(make_folder, pack, copy, _ssh(_INSTALL))


def _start(arguments: list[str]) -> int:
    n_hosts = read_slice().n_hosts
    workdir = settings.check_training(arguments, n_hosts > 1)
    is_shared = workdir.startswith("/") or settings.REMOTE.match(workdir)
    if n_hosts > 1 and not is_shared:
        raise ValueError(
            f"--workdir={workdir} would be another folder on each of {n_hosts} hosts: "
            "give gs://BUCKET/FOLDER, or a path that all of them have mounted"
        )
    if n_hosts > 1 and not settings.REMOTE.match(workdir):
        print(
            f"--workdir={workdir} must be one folder that all {n_hosts} hosts have "
            "mounted",
            file=sys.stderr,
        )
    command = settings.show([
        *(".venv/bin/python", "launch/local.py"),
        *settings.forwarded(),
        *("--", *arguments),
        *(["--multihost"] if n_hosts > 1 else []),
    ])
    return settings.execute(_ssh(_START.format(command=command)))


def _ssh(script: str, worker: str = "all") -> list[str]:
    return [
        *"gcloud compute tpus tpu-vm ssh".split(),
        settings.NAME.value,
        *_where(),
        f"--worker={worker}",
        f"--command={script}",
    ]


def _where() -> list[str]:
    places = {"project": _PROJECT.value, "zone": _ZONE.value}
    return [f"--{name}={value}" for name, value in places.items() if value]


if __name__ == "__main__":
    settings.run(main)
