"""Names that the command line offers and the offline tool implements.

Imports nothing: ``recalkv --help`` must not wait for torch.
"""

METHOD_NAMES = ("kfac", "recalkv", "palu", "svd")
RANK_ALLOCATIONS = ("loss", "fisher", "uniform")
#: One latent per group, of which keys read the first columns; one latent per group that keys and
#: values read whole; latents of their own.
SPAN_KINDS = ("nested", "joint", "split")
#: How latents are stored: as the method knows best, every column in as many bits as it is worth, in
#: the factors' own dtype, or so.
LATENT_DTYPES = ("auto", "bands", "bf16", "fp8", "int8", "int4", "int3")
#: Calibration text where none is named: by the model itself, what comes with Python, and strings to
#: give back to the letter.
DEFAULT_DATASETS = ("self", "builtin", "recall")
#: Calibration samples and tokens of each: what takes minutes.
CPU_SAMPLES = {"num_samples": 64, "seq_len": 512}
GPU_SAMPLES = {"num_samples": 256, "seq_len": 2048}
#: Dtypes of written weights and factors; torch's names.
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
#: Engines of ``recalkv eval``.
ENGINES = ("transformers", "vllm")
