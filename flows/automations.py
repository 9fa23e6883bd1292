"""What a Prefect server has to know: the work pool, what becomes of a zombie, who hears of what went wrong.

`python -m flows.automations` writes it into the server at `PREFECT_API_URL` and deploys `prefect.yaml`; doing it again
changes nothing but what has changed here. A pool that is there keeps its limit: somebody may have set it on purpose.

A flow run whose process was killed would say `Running` for ever and, where one run at a time is allowed, cancel every
later one. Runs send heartbeats; one that falls silent is marked Crashed. It must not have said anything at all: a run
that waits for an approval is silent too, but has said that it is suspended.

Notifications are calls of one webhook, `SLUICE_NOTIFY_WEBHOOK`, which Prefect keeps in a block (encrypted): from the
server, since a process that was killed tells nobody. Of cancelled runs they tell those that a deployment's limit kept
from starting, since one that hangs cancels all that come after it; not those that a person cancelled.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from flows.supervise import child_environment
from pipelines.core import promotion
from pipelines.core.errors import UserError

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.events.schemas.automations import AutomationCore

POOL, TAG, BLOCK = "sluice", "sluice", "sluice-notify"
RUNS_AT_ONCE = 2  # a long run, and room for a refresh or a promotion beside it
WEBHOOK = "SLUICE_NOTIFY_WEBHOOK"
HEARTBEAT_SECONDS = 30  # the least that Prefect allows
SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS  # a machine under load may be late; nobody is, by two beats
ZOMBIES, TROUBLE, NEWS = "sluice: zombies", "sluice: runs that ended badly", "sluice: drift and approvals"
SKIPPED = "sluice: runs that another one kept from starting"
LIMIT_MESSAGE = "Deployment concurrency limit reached*"  # of Prefect's state `Cancelled`, where CANCEL_NEW set it
# Jinja, filled in by Prefect; `text` is what chat systems show.
_RUN_TEXT = '{"text": {{ ("sluice: run " ~ flow_run.name ~ " of " ~ flow.name ~ ": " ~ flow_run.state.name ~ ". " ~ (flow_run.state.message or "")) | tojson }}}'  # noqa: E501
_NEWS_TEXT = '{"text": {{ event.payload["message"] | tojson }}, "event": {{ event.event | tojson }}}'


def set_up(root: Path) -> None:
    """Bring the server at `PREFECT_API_URL` in step with this module and with `prefect.yaml`.

    A promotion that a crash cut off is finished or undone first: nobody may run or promote here for days.

    Raises:
        subprocess.CalledProcessError: `prefect deploy` failed.
    """
    try:
        promotion.recover(root)
    except UserError as error:  # no reason to be without servers
        print(error, file=sys.stderr, flush=True)
    asyncio.run(_set_up())
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    # `prefect.yaml` names the clone by $PWD, which is what the shell had when all this was started
    env = child_environment(PWD=str(root.resolve()))
    subprocess.run(command, cwd=root, env=env, check=True, stdin=subprocess.DEVNULL)


def automations(webhook: UUID | None) -> list[AutomationCore]:
    """Every automation there shall be; those that notify only where there is a webhook (its block's id)."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import CallWebhook, ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    runs = {"prefect.resource.id": "prefect.flow-run.*"}
    ours = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
    silent = EventTrigger(
        match=runs,
        match_related=ours,
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=SILENCE_SECONDS),
    )
    crash = ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message="its process is gone: no heartbeat")
    found = [AutomationCore(name=ZOMBIES, trigger=silent, actions=[crash])]
    if webhook is not None:
        bad = {f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")}
        ended = EventTrigger(match=runs, match_related=ours, expect=bad, posture=Posture.Reactive, threshold=1)
        late = EventTrigger(
            match={**runs, "prefect.state-message": LIMIT_MESSAGE},
            match_related=ours,
            expect={"prefect.flow-run.Cancelled"},
            posture=Posture.Reactive,
            threshold=1,
        )
        news = EventTrigger(expect={"sluice.*"}, posture=Posture.Reactive, threshold=1)
        for name, trigger, payload in (
            (TROUBLE, ended, _RUN_TEXT),
            (SKIPPED, late, _RUN_TEXT),
            (NEWS, news, _NEWS_TEXT),
        ):
            call = CallWebhook(block_document_id=webhook, payload=payload)
            found.append(AutomationCore(name=name, trigger=trigger, actions=[call]))
    return found


async def _set_up() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    async with get_client() as client:
        try:
            await client.read_work_pool(POOL)
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            pool = WorkPoolCreate(name=POOL, type="process", base_job_template=template, concurrency_limit=RUNS_AT_ONCE)
            await client.create_work_pool(pool)
        wanted = automations(await _block())
        for one in wanted:
            await _write(client, one)
        for name in {TROUBLE, SKIPPED, NEWS} - {one.name for one in wanted}:
            for old in await client.read_automations_by_name(name):
                await client.delete_automation(old.id)


async def _write(client: PrefectClient, wanted: AutomationCore) -> None:
    """One automation of a name, as wanted. One that is so already is left alone: a new one forgets what it has seen."""
    there = await client.read_automations_by_name(wanted.name)
    for extra in there[1:]:
        await client.delete_automation(extra.id)
    if not there:
        await client.create_automation(wanted)
    elif (there[0].trigger, there[0].actions) != (wanted.trigger, wanted.actions):
        await client.update_automation(there[0].id, wanted)


async def _block() -> UUID | None:
    """The block that holds the webhook's address; None without one."""
    from prefect.blocks.webhook import Webhook

    address = os.environ.get(WEBHOOK)
    if not address:
        return None
    block = Webhook(url=address, headers={"Content-Type": "application/json"})
    found: UUID = await block.save(BLOCK, overwrite=True)
    return found


if __name__ == "__main__":
    set_up(Path.cwd())
