"""The Helm chart, rendered by Helm and held against Kubernetes' own schemas."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

import asl_vllm
from asl_vllm.config import POLICY_NAMES, AslConfig
from tests.deploy.metrics import VLLM, series
from tests.deploy.promql import asked

helm = pytest.importorskip(
    "helm_python", reason="Helm's library has no build for this machine"
)

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "asl-vllm"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
KUBERNETES = json.loads(Path(__file__).with_name("kubernetes_schema.json").read_text())
# Custom resources, whose schemas no registry that the tests may use has.
UNKNOWN_KINDS = {
    "leaderworkerset.x-k8s.io/v1 LeaderWorkerSet",
    "monitoring.coreos.com/v1 ServiceMonitor",
}

ONE_GPU = {"model": "Qwen/Qwen3-8B"}
FOUR_GPUS = {**ONE_GPU, "tensorParallelSize": 4, "kvBudget": 131072}
NODES = {
    **ONE_GPU,
    "tensorParallelSize": 4,
    "dataParallel": {"sizePerNode": 2, "nodes": 3},
    "cache": {"accessModes": ["ReadWriteMany"]},
}
EVERYTHING = {
    **NODES,
    "servedModelName": "qwen",
    "kvBudget": 0.25,
    "kvPolicyConfig": {"tau": 0.2, "l_min": 10},
    "maxModelLen": 131072,
    "extraArgs": ["--enable-prefix-caching"],
    "extraEnv": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}],
    "image": {"pullSecrets": [{"name": "registry"}], "tag": "x"},
    "apiKey": {"secretName": "keys"},
    "hfToken": {"secretName": "hub"},
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {
        "from": [{"namespaceSelector": {"matchLabels": {"team": "search"}}}],
        "metricsFrom": [{"namespaceSelector": {}}],
    },
    "serviceAccount": {"annotations": {"a": "b"}},
    "podAnnotations": {"a": "b"},
    "podLabels": {"c": "d"},
    "nodeSelector": {"gpu": "h100"},
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "DoNotSchedule",
        }
    ],
}
SCALED = {
    **ONE_GPU,
    "autoscaling": {"enabled": True},
    "cache": {"existingClaim": "weights"},
}
CASES = {
    "one GPU": ONE_GPU,
    "four GPUs": FOUR_GPUS,
    "two engines": {**ONE_GPU, "dataParallel": {"sizePerNode": 2}},
    "three nodes": NODES,
    "scaled": SCALED,
    "everything": EVERYTHING,
}


def render(values: dict) -> dict[str, dict]:
    """Kind -> manifest of a release `r`, as `helm template` would print them."""
    chart = helm.Chart.load(CHART)
    chart.validate_schema(values)
    rendered = chart.render(values, name="r", namespace="serving")
    manifests = [
        document
        for path, text in rendered.items()
        if path.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]
    found = {manifest["kind"]: manifest for manifest in manifests}
    assert len(found) == len(manifests)
    return found


@pytest.fixture(scope="module", params=CASES)
def manifests(request) -> dict[str, dict]:
    return render(CASES[request.param])


def check(manifest: dict, definition: str) -> None:
    schema = {"$ref": f"#/$defs/{definition}", "$defs": KUBERNETES["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(manifest)


def pod_templates(manifests: dict[str, dict]) -> dict[str, dict]:
    """Role -> pod template."""
    if "Deployment" in manifests:
        return {"server": manifests["Deployment"]["spec"]["template"]}
    group = manifests["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return {"server": group["leaderTemplate"], "worker": group["workerTemplate"]}


def container(template: dict) -> dict:
    (only,) = template["spec"]["containers"]
    return only


# --- Kubernetes accepts it ---


def test_kubernetes_knows_every_field(manifests) -> None:
    for manifest in manifests.values():
        kind = f"{manifest['apiVersion']} {manifest['kind']}"
        if kind not in UNKNOWN_KINDS:
            check(manifest, KUBERNETES["kinds"][kind])
    for template in pod_templates(manifests).values():
        check(template, KUBERNETES["kinds"]["PodTemplateSpec"])


def test_a_field_that_kubernetes_does_not_know_would_be_found() -> None:
    manifest = render(ONE_GPU)["Deployment"]
    (only,) = manifest["spec"]["template"]["spec"]["containers"]
    only["startupProbe"]["failureTreshold"] = 1
    with pytest.raises(jsonschema.ValidationError, match="failureTreshold"):
        check(manifest, KUBERNETES["kinds"]["apps/v1 Deployment"])


@pytest.mark.parametrize("name", CASES)
def test_helm_lint_has_no_complaint(name) -> None:
    report = helm.lint(CHART, CASES[name], strict=True)
    worse_than_info = [m for m in report["messages"] if m["severity"] > 1]
    assert worse_than_info == [] == report["errors"]


def test_the_pieces_refer_to_each_other(manifests) -> None:
    server = pod_templates(manifests)["server"]
    labels = server["metadata"]["labels"]
    port = {port["name"]: port for port in container(server)["ports"]}["http"]
    selectors = [
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ]
    if "Deployment" in manifests:
        selectors.append(manifests["Deployment"]["spec"]["selector"]["matchLabels"])
    for selector in selectors:
        assert selector.items() <= labels.items()
        for role, template in pod_templates(manifests).items():
            others = template["metadata"]["labels"].items()
            assert (selector.items() <= others) == (role == "server")
    assert manifests["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    for template in pod_templates(manifests).values():
        account = template["spec"]["serviceAccountName"]
        assert account == manifests["ServiceAccount"]["metadata"]["name"]
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        mounts = {mount["name"] for mount in container(template)["volumeMounts"]}
        assert mounts == volumes
    if "HorizontalPodAutoscaler" in manifests:
        target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
        scaled = manifests[target["kind"]]
        assert target["name"] == scaled["metadata"]["name"]
        assert target["apiVersion"] == scaled["apiVersion"]
        assert "replicas" not in scaled["spec"]
    if "ServiceMonitor" in manifests:
        wanted = manifests["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
        assert wanted.items() <= manifests["Service"]["metadata"]["labels"].items()


def test_pods_are_confined(manifests) -> None:
    for template in pod_templates(manifests).values():
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        context = container(template)["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_the_user_is_that_of_the_image() -> None:
    (user,) = re.findall(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert VALUES["podSecurityContext"]["runAsUser"] == int(user)


# --- It serves what was asked for ---


def test_one_gpu() -> None:
    manifests = render(ONE_GPU)
    only = container(pod_templates(manifests)["server"])
    assert only["args"] == [
        *("Qwen/Qwen3-8B", "--kv-policy=asl", "--tensor-parallel-size=1")
    ]
    assert only["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert only["image"] == f"asl-vllm:{asl_vllm.__version__}"
    assert "HorizontalPodAutoscaler" not in manifests
    assert "ServiceMonitor" not in manifests


def test_several_gpus() -> None:
    only = container(pod_templates(render(FOUR_GPUS))["server"])
    assert "--tensor-parallel-size=4" in only["args"]
    assert "--kv-budget=131072" in only["args"]
    assert only["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert only["resources"]["requests"]["nvidia.com/gpu"] == 4


def test_several_engines_on_one_node() -> None:
    only = container(pod_templates(render(CASES["two engines"]))["server"])
    assert "--data-parallel-size=2" in only["args"]
    assert only["resources"]["limits"]["nvidia.com/gpu"] == 2


def test_several_nodes() -> None:
    manifests = render(NODES)
    spec = manifests["LeaderWorkerSet"]["spec"]
    assert spec["leaderWorkerTemplate"]["size"] == 3
    assert spec["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    templates = pod_templates(manifests)
    for template in templates.values():
        arguments = container(template)["args"]
        assert "--data-parallel-size=6" in arguments
        assert "--data-parallel-size-local=2" in arguments
        assert "--data-parallel-rpc-port=13345" in arguments
        assert container(template)["resources"]["limits"]["nvidia.com/gpu"] == 8
    leader, worker = container(templates["server"]), container(templates["worker"])
    assert "--data-parallel-address=$(POD_IP)" in leader["args"]
    assert "POD_IP" in {variable["name"] for variable in leader["env"]}
    # Only the leader answers requests, so only it is probed.
    assert "readinessProbe" in leader
    assert not any(key.endswith("Probe") or key == "ports" for key in worker)


def test_a_worker_finds_its_leader_and_its_ranks(tmp_path) -> None:
    """The worker's shell command is run, with a server that prints its arguments."""
    worker = container(pod_templates(render(NODES))["worker"])
    programs = {
        "python3": '#!/bin/sh\nprintf "%s\\n" "$@"\n',
        # The name does not resolve at once.
        "getent": '#!/bin/sh\n[ -e "$TRIED" ] && echo "10.0.0.7 STREAM $2" || '
        '{ : >"$TRIED"; exit 2; }\n',
        "sleep": "#!/bin/sh\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    ran = subprocess.run(
        [*worker["command"], *worker["args"]],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "TRIED": str(tmp_path / "tried"),
            "LWS_LEADER_ADDRESS": "r-asl-vllm-0.r-asl-vllm.serving",
            "LWS_WORKER_INDEX": "2",
        },
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == [
        *("-m", "asl_server", "Qwen/Qwen3-8B", "--kv-policy=asl"),
        "--tensor-parallel-size=4",
        "--data-parallel-size=6",
        "--data-parallel-size-local=2",
        "--data-parallel-rpc-port=13345",
        "--headless",
        "--data-parallel-address=10.0.0.7",
        "--data-parallel-start-rank=4",
    ]


def test_everything_reaches_the_command_line() -> None:
    manifests = render(EVERYTHING)
    only = container(pod_templates(manifests)["server"])
    assert "--served-model-name=qwen" in only["args"]
    assert "--kv-budget=0.25" in only["args"]
    assert "--max-model-len=131072" in only["args"]
    assert "--enable-prefix-caching" in only["args"]
    (option,) = (a for a in only["args"] if a.startswith("--kv-policy-config="))
    config = AslConfig.from_dict(json.loads(option.partition("=")[2]))
    assert (config.tau, config.l_min) == (0.2, 10)
    variables = {variable["name"]: variable for variable in only["env"]}
    key = variables["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"]
    assert key == {"name": "keys", "key": "api-key"}
    token = variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert token == {"name": "hub", "key": "token"}
    policy = manifests["NetworkPolicy"]["spec"]["ingress"]
    assert len(policy[0]["from"]) == 2
    assert "ports" not in policy[1]  # among the group's own pods


def test_vllm_has_the_options_of_the_command_line() -> None:
    """Read from vLLM's source and ours: a parser takes seconds to build."""
    sources = (
        ROOT / "asl_vllm/engine/frontend/cli.py",
        VLLM / "engine/arg_utils.py",
        VLLM / "entrypoints/launchers/cli_args.py",
    )
    known = set()
    for source in sources:
        known |= set(re.findall(r'"(--[a-z-]+)"', source.read_text()))
    rendered = render(EVERYTHING)
    used = set()
    for template in pod_templates(rendered).values():
        words = container(template)["args"] + container(template).get("command", [])
        used |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(words)))
    assert {"--headless", "--kv-policy", "--data-parallel-start-rank"} <= used
    assert used <= known


# --- Values ---


@pytest.mark.parametrize(
    "values",
    [
        {"modle": "m"},
        {"kvBudget": 0},
        {"kvBudget": 1},
        {"kvBudget": 1.5},
        {"kvBudget": "2048"},
        {"tensorParallelSize": 0},
        {"dataParallel": {"nodes": "two"}},
        {"autoscaling": {"targetPoolPercent": 120}},
        {"cache": {"size": "a lot"}},
        {"networkPolicy": {"enabled": "yes"}},
    ],
)
def test_bad_values_are_refused(values) -> None:
    with pytest.raises(helm.HelmError):
        render({**ONE_GPU, **values})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "set the model to serve"),
        ({**NODES, "cache": {}}, "ReadWriteMany"),
        ({**ONE_GPU, "replicas": 2}, "ReadWriteMany"),
        (
            {**SCALED, "autoscaling": {"enabled": True, "minReplicas": 9}},
            "maxReplicas is below minReplicas",
        ),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(values, reason) -> None:
    with pytest.raises(helm.HelmError, match=reason):
        render(values)


def test_the_schema_and_the_values_name_the_same_keys() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(values: dict, node: dict, where: str) -> None:
        assert set(values) == set(node["properties"]) - {"global"}, where
        for key, value in values.items():
            below = node["properties"][key]
            if "properties" in below:
                compare(value, below, f"{where}.{key}")

    compare(VALUES, schema, "")


def test_every_value_is_used() -> None:
    text = "".join(p.read_text() for p in (CHART / "templates").iterdir())
    for section, value in VALUES.items():
        if f"{section}.secretName" in text or not isinstance(value, dict):
            assert re.search(rf"alues\.{section}\b", text), section
        elif f"toYaml $values.{section}" not in text and section != "kvPolicyConfig":
            for key in value:
                name = rf"(alues\.{section}|\$dp)\.{key}\b"
                assert re.search(name, text), f"{section}.{key}"


def test_defaults_are_those_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == asl_vllm.__version__
    assert VALUES["kvPolicy"] in POLICY_NAMES
    assert VALUES["kvBudget"] is AslConfig().budget


# --- Metrics for the autoscaler ---


def test_the_autoscaler_asks_for_metrics_that_the_adapter_makes() -> None:
    adapter = yaml.safe_load(
        (ROOT / "deploy" / "prometheus-adapter" / "values.yaml").read_text()
    )
    made = {rule["name"]["as"]: rule for rule in adapter["rules"]["custom"]}
    autoscaler = render(SCALED)["HorizontalPodAutoscaler"]["spec"]
    wanted = {metric["pods"]["metric"]["name"] for metric in autoscaler["metrics"]}
    assert wanted == set(made)
    for rule in made.values():
        (name,) = asked(rule["seriesQuery"]).metrics
        assert name in series()
        query = rule["metricsQuery"]
        for placeholder, value in (
            ("<<.GroupBy>>", "pod"),
            ("<<.Series>>", name),
            ("<<.LabelMatchers>>", 'namespace="n"'),
        ):
            assert placeholder in query
            query = query.replace(placeholder, value)
        assert asked(query).metrics == {name}
