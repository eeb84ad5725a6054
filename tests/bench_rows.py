"""Result files of a benchmark, made up."""


def row(form: str, kind: str, us: float, **other) -> dict:
    base = dict(op="score gradient fwd+bwd", case="flow 16x128x128 bf16 b=1", mode="graph", rounds=50, bytes=3_145_728)
    return base | dict(form=form, kind=kind, median_s=us * 1e-6, iqr_s=1e-7, launches=3, fused_launches=2, error=1e-7,
                       tolerance=1e-6) | other  # fmt: skip


def result(device_type: str, rows: list[dict], **other) -> dict:
    environment = dict(device="Some device", device_type=device_type, commit="0123456789", time="2026-01-02T03:04:05")
    return dict(format=1, partial=False, environment=environment | other, rows=rows, skipped=[])


ROWS = [
    row("copy_", "copy", 1000, op="copy", case="2048 MiB", mode="call", bytes=2_000_000_000),
    row("ours", "ours", 5), row("DMD2", "eager", 100), row("rcm", "eager", 60), row("compile", "compile", 6),
]  # fmt: skip
