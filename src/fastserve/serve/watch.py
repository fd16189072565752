"""Looks once a second at what changes by itself: the files of keys, and what the machine consumes."""

from __future__ import annotations

import asyncio
import logging

from fastserve.errors import OptionError
from fastserve.serve.energy import EnergyMeter
from fastserve.serve.model_table import ModelTable
from fastserve.serve.tenant_table import TenantTable

_SECONDS = 1.0

logger = logging.getLogger(__name__)


async def watch(tenants: TenantTable, models: ModelTable, energy: EnergyMeter) -> None:
    """Until it is cancelled."""
    while True:
        await asyncio.sleep(_SECONDS)
        try:
            if await asyncio.to_thread(tenants.keys.have_changed):
                await _reload(tenants, models)
            usages = [tenant.usage for tenant in tenants]
            energy.sample(usages, is_busy=tenants.num_running > 0)
        except Exception:
            logger.exception("a look at keys and energy has failed by a defect")


async def _reload(tenants: TenantTable, models: ModelTable) -> None:
    try:
        await tenants.reload(models.generators)
    except OptionError as error:
        logger.error("keys have changed and are not taken, the old ones stay: %s", error)
        return
    fields = {"num_keys": len(tenants.keys), "num_tenants": len(tenants.keys.table.terms)}
    logger.info("keys have changed", extra={"fields": fields})
