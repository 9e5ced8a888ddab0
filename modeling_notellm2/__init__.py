"""NoteLLM-2 for transformers: importing this package registers it with AutoConfig, AutoModel and AutoProcessor."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from ._version import __version__
from .configuration_notellm2 import NoteLLM2Config
from .modeling_notellm2 import NonFiniteError, NoteLLM2Model, NoteLLM2Output, NoteLLM2PreTrainedModel, NoteStates
from .processing_notellm2 import NoteError, NoteLLM2Processor

AutoConfig.register(NoteLLM2Config.model_type, NoteLLM2Config)
AutoModel.register(NoteLLM2Config, NoteLLM2Model)
AutoProcessor.register(NoteLLM2Config, NoteLLM2Processor)

__all__ = [
    "NonFiniteError",
    "NoteError",
    "NoteLLM2Config",
    "NoteLLM2Model",
    "NoteLLM2Output",
    "NoteLLM2PreTrainedModel",
    "NoteLLM2Processor",
    "NoteStates",
    "__version__",
]
