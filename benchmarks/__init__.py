"""Measurements and demonstrations; installed as ``recalkv_vllm.benchmarks``."""
