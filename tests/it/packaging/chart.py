"""Lints the chart, renders it, and validates what comes out: `chart.py CHART`.

Sets of values come as a JSON list on stdin. For each, the answer on stdout has the manifests that it makes, or why it
makes none: {"documents": [...]} or {"refused": "..."}. What is wrong with the chart itself ends the program.
"""

import json
import sys

import helm_python as helm
import kubernetes_validate
import yaml

# The oldest version that Chart.yaml names, and the newest that the validator knows.
VERSIONS = ["1.27", "1.37"]
# Of these there is no schema: they are resources that an operator brings.
CUSTOM = {"PodMonitor"}
INFO = 1


def documents(rendered):
    for path, text in sorted(rendered.items()):
        if path.endswith(".yaml"):
            yield from (document for document in yaml.safe_load_all(text) if document)


def answer(chart, values):
    try:
        chart.validate_schema(values)
        made = list(documents(chart.render(values, name="edge", namespace="prod")))
    except helm.HelmError as error:
        return {"refused": str(error)}
    for document in made:
        if document["kind"] not in CUSTOM:
            for version in VERSIONS:
                kubernetes_validate.validate(document, version, strict=True)
    return {"documents": made}


def main():
    path = sys.argv[1]
    report = helm.lint(path, strict=True)
    found = [message for message in report["messages"] if message["severity"] > INFO]
    if found or report["errors"]:
        sys.exit(f"helm lint: {found} {report['errors']}")
    with helm.Chart.load(path) as chart:
        print(json.dumps([answer(chart, values) for values in json.load(sys.stdin)]))


main()
