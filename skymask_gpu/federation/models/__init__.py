"""The models of the experiments.

| file | what |
| --- | --- |
| ``registry.py`` | the registry ``MODELS``, with an example of your own model, and ``build_model`` |
| ``mlp.py``, ``cnn.py``, ``resnet.py``, ``vit.py`` | one family of models each |
| ``lstm.py`` | a recurrent network for text |
| ``lenet.py`` | the network that gradient inversion is measured on |

Models with group norm, and those without convolutions, run under ``vmap(grad)``. Batch norm keeps
running statistics, so it runs there only if each client has buffers of its own.
"""

# Importing a family registers its models. Errors list them in this order.
# isort: off
from skymask_gpu.federation.models.registry import MODELS, build_model
from skymask_gpu.federation.models.mlp import MLP, LogisticRegression
from skymask_gpu.federation.models.cnn import PaperCNN
from skymask_gpu.federation.models.resnet import ResNet
from skymask_gpu.federation.models.vit import VisionTransformer
from skymask_gpu.federation.models.lstm import LSTM
from skymask_gpu.federation.models.lenet import LeNet

__all__ = ["LSTM", "MLP", "MODELS", "LeNet", "LogisticRegression", "PaperCNN", "ResNet", "VisionTransformer", "build_model"]
