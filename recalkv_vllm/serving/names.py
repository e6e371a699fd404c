"""What vLLM finds us by: the backend's name, and where its classes are. Imports nothing heavy."""

from __future__ import annotations

from recalkv_vllm.architectures import SUPPORTED

#: As ``--attention-backend`` takes it, in any case.
BACKEND_NAME = "RECALKV"
BACKEND_CLASS = "recalkv_vllm.serving.attention.backend.RecalkvBackend"
#: Its attributes are the served classes.
MODEL_MODULE = "recalkv_vllm.serving.model.classes"
#: Served architecture to vLLM's own class that it derives from, as ``module:class``.
ARCHITECTURES = {entry.served_name: entry.vllm_class for entry in SUPPORTED.values()}
#: Those of models of several modalities, whose language model is a part.
MULTIMODAL = {entry.served_name for entry in SUPPORTED.values() if entry.multimodal}
#: Those of them whose images are not served.
TEXT_ALONE = {entry.served_name for entry in SUPPORTED.values() if entry.text_alone}
#: Those of models some of whose layers have no attention.
HYBRID = {entry.served_name for entry in SUPPORTED.values() if entry.hybrid}
