"""Published sequential recommenders under the head, losses, data and evaluation of this package.

A new one is a file beside these and a line below.
"""

from .bert4rec import *
from .common import BaselineForSequentialRecommendation
from .elastic_paper import *
from .gru4rec import *
from .hstu import *
from .lightsans import *
from .linrec import *
from .lrurec import *
from .popularity import *
from .sasrec import *


BASELINES = tuple(BaselineForSequentialRecommendation.__subclasses__())
