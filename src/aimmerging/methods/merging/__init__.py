"""Merging at task ends, in ΔW space: one base class, two settings, a rule a class."""

from aimmerging.methods.merging.adaptive import AdaMerging
from aimmerging.methods.merging.at_end import MergeAtEnd
from aimmerging.methods.merging.fisher import Became, FisherMerge
from aimmerging.methods.merging.linear import Average, TaskArithmetic
from aimmerging.methods.merging.regression import RegMean
from aimmerging.methods.merging.sparse import Breadcrumbs, Dare, Della, MagMax, Ties
from aimmerging.methods.merging.subspace import CoreSpace, Knots, Opcm, Slerp

__all__ = [
    "AdaMerging",
    "Average",
    "Became",
    "Breadcrumbs",
    "CoreSpace",
    "Dare",
    "Della",
    "FisherMerge",
    "Knots",
    "MagMax",
    "MergeAtEnd",
    "Opcm",
    "RegMean",
    "Slerp",
    "TaskArithmetic",
    "Ties",
]
