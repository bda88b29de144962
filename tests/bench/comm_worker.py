"""One rank of a real world that counts what its steps send. Arguments: output path."""

import gc
import json
from pathlib import Path

import torch.distributed as dist
from support.processes import joined

from subspan.bench.comm import CommSetting, _row, count
from subspan.costs.traffic import WAYS


def main(path):
    with joined():
        setting, rows = CommSetting(dist.get_world_size(), "llama-nano", 16), {}
        for name, way in WAYS.items():
            rows[name] = _row(setting, way, *count(setting, way))
            gc.collect()  # what DDP holds of one is not to be there in the next
        Path(f"{path}.{dist.get_rank()}.json").write_text(json.dumps(rows))
