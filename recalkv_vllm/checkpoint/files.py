"""Names of a model directory's files."""

CONFIG_FILE = "config.json"
FACTORS_FILE = "recalkv.safetensors"
#: A model's weights: one file, or several with an index.
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
