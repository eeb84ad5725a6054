"""The ablation's rows, statistics and report; its command is senseflow/ablate.py."""
