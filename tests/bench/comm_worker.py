"""A rank of a real world, which counts what its steps send and writes it beside the path that it is given."""

import gc
import json
from pathlib import Path

import torch.distributed as dist
from support.processes import joined

from subspan.bench.comm import CommSetting, count, row_of
from subspan.costs.traffic import COUNTED


def main(path):
    with joined():
        setting, rows = CommSetting(dist.get_world_size(), "llama-nano", 16), {}
        for name, way in COUNTED.items():
            rows[name] = row_of(setting, way, *count(setting, way))
            gc.collect()  # what DDP holds of one way must not be there in the next
        Path(f"{path}.{dist.get_rank()}.json").write_text(json.dumps(rows))
