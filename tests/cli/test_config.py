"""Printed settings can be given back as a file, and are the same then."""

from pathlib import Path

import pytest

from subspan.cli import main

FLAGS = {
    "pretrain": [
        "--optim.eps=1e-7",
        "--optim.selector={power: 2.0}",
        "--optim.betas=[0.8, 0.9]",
        "--backward-side",
        "--rank",
        "8",
        '--rank_pattern={"q_proj": 32, "layers[.]1.*mlp": 0.5}',
    ],
    "finetune": [
        "--lora.rank=4",
        "--evaluation.patience=3",
        "--optim.targets=[q_proj, v_proj]",
        "--lr",
        "0.01",
        "--rank=0.25",
    ],
}


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", FLAGS)
@pytest.mark.parametrize("flag", ["--print_config", "--print-config"])
def test_round_trip(command: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = printed([command, *FLAGS[command], flag], capsys)
    assert first != printed([command, flag], capsys)
    path = tmp_path / "run.yaml"
    path.write_text(first)
    assert printed([command, f"--config={path}", flag], capsys) == first
    changed = printed([command, f"--config={path}", "--seed=9", flag], capsys)
    assert changed == first.replace("seed: 0", "seed: 9")
    assert changed != first
