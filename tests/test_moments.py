"""bench.moments: what it calls agreement; and, slow, that 8-bit moments train the embedded preset as fp32 ones do."""

import pytest

from bench.moments import main, verdicts


def test_verdicts():
    runs = {"fp32": [dict(kid=1.0), dict(kid=3.0)], "8bit": [dict(kid=3.0), dict(kid=4.5)]}
    (row,) = verdicts(runs)
    assert row == dict(score="kid", fp32=2.0, eight=3.75, spread=2.0, agrees=True)
    runs["8bit"][1]["kid"] = 5.5
    assert not verdicts(runs)[0]["agrees"]


@pytest.mark.slow
def test_8_bit_moments_train_as_fp32(capsys):
    assert main([]) == 0, capsys.readouterr().out
