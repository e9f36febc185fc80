"""Aggregation rules: from the clients' updates to the server's step.

| file | what |
| --- | --- |
| ``interface.py`` | ``RULES``, the registry; what a rule is given and gives back |
| ``building.py`` | ``build_rule``: a rule by its name |
| ``averages.py`` | fedavg, median, trimmed-mean, geometric-median: they judge nobody |
| ``clipping.py`` | centred-clipping, fed-nga: they bound each update's length and judge nobody |
| ``krum.py`` | krum, multi-krum, bulyan |
| ``fltrust.py``, ``flame.py``, ``deepsight.py`` | one rule each |
| ``tolpegin.py``, ``fldetector.py``, ``skymask.py`` | one rule each |
| ``dnc.py``, ``signguard.py``, ``alignins.py``, ``fedgreed.py``, ``fedlaw.py`` | one rule each |
| ``mars.py``, ``lasa.py``, ``flguardian.py`` | one rule each; they look at single layers |
| ``root_steps.py`` | root-only, root-finetune: controls, what the server's samples give by themselves |
| ``preaggregators.py`` | nnm, bucketing, foundation-fl: they mix or add updates before another rule |
| ``wrappers.py`` | a function as a rule; a rule that NaN and Inf do not reach |
| ``rows.py``, ``clustering.py``, ``layers.py``, ``last_layer.py`` | what several rules share |
| ``reference.py``, ``reference_layers.py`` | the rules as literal loops, for tests and the benchmark |
"""

# Importing a file registers its rules.
from skymask_gpu.federation.rules.averages import fedavg as fedavg
from skymask_gpu.federation.rules.building import build_rule
from skymask_gpu.federation.rules.deepsight import DeepSight as DeepSight
from skymask_gpu.federation.rules.flame import flame as flame
from skymask_gpu.federation.rules.fldetector import FLDetector as FLDetector
from skymask_gpu.federation.rules.fltrust import fltrust as fltrust
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, Rule, RuleContext, RuleResult
from skymask_gpu.federation.rules.krum import krum as krum
from skymask_gpu.federation.rules.skymask import SkyMaskSettings
from skymask_gpu.federation.rules.tolpegin import Tolpegin as Tolpegin
from skymask_gpu.federation.rules.wrappers import FiniteRows, Stateless

# isort: split
from skymask_gpu.federation.rules.alignins import AlignIns as AlignIns
from skymask_gpu.federation.rules.clipping import CentredClipping as CentredClipping
from skymask_gpu.federation.rules.dnc import DivideAndConquer as DivideAndConquer
from skymask_gpu.federation.rules.fedgreed import FedGreed as FedGreed
from skymask_gpu.federation.rules.fedlaw import FedLaw as FedLaw
from skymask_gpu.federation.rules.flguardian import FLGuardian as FLGuardian
from skymask_gpu.federation.rules.lasa import Lasa as Lasa
from skymask_gpu.federation.rules.mars import Mars as Mars
from skymask_gpu.federation.rules.preaggregators import Bucketing as Bucketing
from skymask_gpu.federation.rules.root_steps import RootFinetune as RootFinetune
from skymask_gpu.federation.rules.signguard import SignGuard as SignGuard

__all__ = [
    "RULES",
    "FiniteRows",
    "RoundInfo",
    "Rule",
    "RuleContext",
    "RuleResult",
    "SkyMaskSettings",
    "Stateless",
    "build_rule",
]
