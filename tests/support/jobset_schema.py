"""JSON schema of what a JobSet may say, by hand: the fields that the launchers use, as JobSet v1alpha2, batch/v1 and
core/v1 state them. A field that is not here is refused, as the API server would drop it in silence."""

from __future__ import annotations

from typing import Any

TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
COUNTS = {"type": "object", "additionalProperties": NUMBER}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def fields(required: str = "", **known: dict[str, Any]) -> dict[str, Any]:
    """An object of known fields, those required named in one text."""
    return {"type": "object", "properties": known, "required": required.split(), "additionalProperties": False}


METADATA = fields("name", name=NAME, annotations=TEXTS, labels=TEXTS)
ENV = fields("name", name=TEXT, value=TEXT, valueFrom=fields("fieldRef", fieldRef=fields("fieldPath", fieldPath=TEXT)))
CONTAINER = fields(
    "name image",
    name=NAME,
    image=TEXT,
    workingDir=TEXT,
    command=listed(TEXT),
    args=listed(TEXT),
    env=listed(ENV),
    ports=listed(fields("containerPort", containerPort={"type": "integer", "minimum": 1, "maximum": 65535}, name=TEXT)),
    resources=fields(requests=COUNTS, limits=COUNTS),
    volumeMounts=listed(fields("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG)),
)
POD = fields(
    "containers restartPolicy",
    restartPolicy=one_of("Never", "OnFailure"),
    serviceAccountName=NAME,
    terminationGracePeriodSeconds=NUMBER,
    nodeSelector=TEXTS,
    containers=listed(CONTAINER),
    volumes=listed(fields("name", name=NAME, emptyDir=fields(medium=one_of("", "Memory"), sizeLimit=TEXT))),
)
POD_FAILURE_RULE = fields(
    "action",
    action=one_of("FailJob", "FailIndex", "Ignore", "Count"),
    onExitCodes=fields(
        "operator values",
        containerName=NAME,
        operator=one_of("In", "NotIn"),
        values=listed({"type": "integer", "minimum": 0, "maximum": 255}),
    ),
)
JOB = fields(
    "template",
    parallelism=NUMBER,
    completions=NUMBER,
    completionMode=one_of("Indexed", "NonIndexed"),
    backoffLimit=NUMBER,
    podFailurePolicy=fields("rules", rules=listed(POD_FAILURE_RULE)),
    template=fields("spec", metadata=METADATA, spec=POD),
)
JOBSET = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=METADATA,
    spec=fields(
        "replicatedJobs",
        network=fields(enableDNSHostnames=FLAG, subdomain=TEXT, publishNotReadyAddresses=FLAG),
        failurePolicy=fields(
            maxRestarts=NUMBER,
            rules=listed(
                fields(
                    "action",
                    name=TEXT,
                    action=one_of(
                        "FailJobSet",
                        "RestartJobSet",
                        "RestartJobSetAndIgnoreMaxRestarts",
                        "RestartJob",
                        "RestartJobAndIgnoreMaxRestarts",
                    ),
                    onJobFailureReasons=listed(
                        one_of(
                            "BackoffLimitExceeded",
                            "DeadlineExceeded",
                            "FailedIndexes",
                            "MaxFailedIndexesExceeded",
                            "PodFailurePolicy",
                        )
                    ),
                    targetReplicatedJobs=listed(NAME),
                )
            ),
        ),
        replicatedJobs=listed(
            fields("name template", name=NAME, replicas=NUMBER, template=fields("spec", metadata=METADATA, spec=JOB))
        ),
    ),
)
