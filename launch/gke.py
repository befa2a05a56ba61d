"""Trains on a slice of TPUs of a GKE cluster, as a JobSet.

    python launch/gke.py --accelerator=v5p-128 --image=I --dry_run -- \\
        --config=experiments/F.py --workdir=gs://B/W

Writes a manifest and hands it to `kubectl create`, for kubectl's current cluster, in
which the JobSet controller is installed; with --dry_run it is printed. The image is
that of launch/Dockerfile. A pod that fails (1, 2, 130) fails the JobSet. Whatever else
ends one (75, 76, a signal, an eviction, a node that goes) has all pods started again,
from the last checkpoint: --max_restarts times in all, for a JobSet knows of no
checkpoints.
"""

from typing import Any

import settings
import yaml
from absl import flags
from slices import SPOT, Slice, read_slice

_IMAGE = flags.DEFINE_string("image", None, "the container image, of launch/Dockerfile")
_NAMESPACE = flags.DEFINE_string("namespace", "default", "of the cluster")
_SERVICE_ACCOUNT = flags.DEFINE_string(
    "service_account", None, "Kubernetes account with rights to the workdir's bucket"
)
_LASTING = [1, 2, 130]  # exit codes that a restart does not cure
_CONTAINER = "train"


def main(words: list[str], arguments: list[str]) -> int:
    """Creates the JobSet."""
    if words:
        raise ValueError(f"unexpected {words[0]!r}: give arguments of train behind --")
    manifest = yaml.safe_dump(_job_set(read_slice(), arguments), sort_keys=False)
    return settings.execute(
        ["kubectl", "create", "--filename=-"],
        text=f"# By launch/gke.py, for kubectl create --filename=-\n{manifest}",
    )


def _job_set(tpus: Slice, arguments: list[str]) -> dict[str, Any]:
    # One pod's failure fails the Job at once, and a Job's failure is the JobSet's to
    # judge: by reason PodFailurePolicy if the exit code was one of the lasting.
    job = {
        "backoffLimit": 0,
        "completionMode": "Indexed",
        "completions": tpus.n_hosts,
        "parallelism": tpus.n_hosts,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": _CONTAINER,
                        "operator": "In",
                        "values": _LASTING,
                    },
                }
            ]
        },
        "template": {"spec": _pod(tpus, arguments)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": settings.NAME.value,
            "namespace": _NAMESPACE.value,
            # All pods in one node pool, which is one slice.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": (
                    "cloud.google.com/gke-nodepool"
                )
            },
        },
        "spec": {
            # A headless service, by which the pods have names for each other.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": settings.MAX_RESTARTS.value,
                "rules": [
                    {
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": "train", "replicas": 1, "template": {"spec": job}}
            ],
        },
    }


def _pod(tpus: Slice, arguments: list[str]) -> dict[str, Any]:
    workdir = settings.check_training(arguments, tpus.n_hosts > 1)
    if not settings.REMOTE.match(workdir):
        raise ValueError(
            f"--workdir={workdir} would end with its pod: give gs://BUCKET/FOLDER"
        )
    if not _IMAGE.value:
        raise ValueError("give --image, built of launch/Dockerfile and pushed")
    chips = {"google.com/tpu": tpus.chips_per_host}
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": _IMAGE.value,
        "command": ["sae-jax", "train", *arguments],
        "resources": {"requests": chips, "limits": dict(chips)},
    }
    if tpus.n_hosts > 1:
        container["command"].append("--multihost")
    if variables := settings.variables():
        container["env"] = [{"name": n, "value": v} for n, v in variables.items()]
    labels = {
        "cloud.google.com/gke-tpu-accelerator": tpus.generation.gke_label,
        "cloud.google.com/gke-tpu-topology": tpus.topology,
    }
    if SPOT.value:
        labels["cloud.google.com/gke-spot"] = "true"
    account = _SERVICE_ACCOUNT.value
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.GRACE_SECS.value,
        **({"serviceAccountName": account} if account else {}),
        "nodeSelector": labels,
        "containers": [container],
    }


if __name__ == "__main__":
    settings.run(main)
