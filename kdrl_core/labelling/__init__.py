"""Measure difficulty labels: pass@k of a model on problems without a label (B.1.1). Only sampling imports torch.

A label is the number of **wrong answers out of num_samples**, as in the published data. Wrong means wrong by accuracy
alone (`require_format=False`), as in the paper's evaluation (4.1): the difficulty of a problem does not depend on the
format of the response. A box inside the thought is not an answer here either.
"""

from kdrl_core.labelling.label import label_problems, work_folder
from kdrl_core.labelling.label_plan import LabelOptions, LabelPlan, plan_labels
from kdrl_core.labelling.label_summary import LabelSummary, pass_at_k

__all__ = ["LabelOptions", "LabelPlan", "LabelSummary", "label_problems", "pass_at_k", "plan_labels", "work_folder"]
