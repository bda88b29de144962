"""One rank of a real world that counts what its steps send. Arguments: output path."""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from subspan.bench.comm import CommSetting, _row, count
from subspan.bench.traffic import WAYS


def main(path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    setting, rows = CommSetting(dist.get_world_size(), "llama-nano", 16), {}
    for name, way in WAYS.items():
        rows[name] = _row(setting, way, *count(setting, way))
        gc.collect()  # DDP must be gone before the group is
    Path(f"{path}.{dist.get_rank()}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
