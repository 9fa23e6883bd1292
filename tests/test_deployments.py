"""`prefect.yaml` names flows, parameters, stages and a pool that exist."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import yaml
from fake_repository import ROOT
from prefect import Flow
from prefect.client.schemas.schedules import CronSchedule

from flows import automations, backfill
from pipelines.core import graph

FILE: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS: dict[str, dict[str, Any]] = {one["name"]: one for one in FILE["deployments"]}


def flow_of(deployment: dict[str, Any]) -> Flow[Any, Any]:
    path, name = deployment["entrypoint"].split(":")
    found = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert isinstance(found, Flow)
    return found


def test_every_kind_of_work_has_a_deployment() -> None:
    assert {"train", "refresh", "evaluate", "promote", "rollback", "backfill", "backfill-version"} == set(DEPLOYMENTS)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_calls_a_flow_with_parameters_it_has(name: str) -> None:
    deployment = DEPLOYMENTS[name]
    flow = flow_of(deployment)
    accepted = inspect.signature(flow.fn).parameters
    assert set(deployment["parameters"]) <= set(accepted) and deployment["parameters"]["root"] == "."
    assert all(one.default is not inspect.Parameter.empty for one in accepted.values())  # the form can be sent as it is
    flow.validate_parameters(deployment["parameters"])
    assert deployment["work_pool"] == {"name": automations.POOL}
    assert automations.TAG in deployment["tags"]  # or nobody would look after its zombies
    for schedule in deployment.get("schedules", []):
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])


def test_a_backfill_finds_the_deployment_that_does_the_work() -> None:
    flow, name = backfill.DEPLOYMENT.split("/")
    assert flow_of(DEPLOYMENTS[name]).name == flow
    given = {"revision", "data_of", "from_stage", "until_stage", "params"}
    assert given <= set(inspect.signature(flow_of(DEPLOYMENTS[name]).fn).parameters)
    assert DEPLOYMENTS[name]["concurrency_limit"]["collision_strategy"] == "ENQUEUE"  # they wait, none is lost


def test_a_refresh_touches_stages_that_exist() -> None:
    assert set(DEPLOYMENTS["refresh"]["parameters"]["only"]) <= set(graph.load(ROOT))


def test_a_run_may_take_its_time_but_not_for_ever() -> None:
    for name in ("train", "refresh", "evaluate"):
        accepted = inspect.signature(flow_of(DEPLOYMENTS[name]).fn).parameters
        hours = DEPLOYMENTS[name]["parameters"].get("hours", accepted["hours"].default)
        assert 0 < hours <= 24
