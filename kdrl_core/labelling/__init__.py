"""Difficulty labels measured: pass@k of a model on problems that have none (B.1.1). Torch waits until it samples.

A label is the number of **wrong answers out of num_samples**, as in the published data, and wrong means wrong by
accuracy alone (`require_format=False`), as in the paper's evaluation (4.1): a problem is as hard as its answer is hard
to find, however the response is laid out. A box inside the thought is no answer here either.
"""

from kdrl_core.labelling.label import label_problems, work_folder
from kdrl_core.labelling.label_plan import LabelOptions, LabelPlan, plan_labels
from kdrl_core.labelling.label_summary import LabelSummary, pass_at_k

__all__ = ["LabelOptions", "LabelPlan", "LabelSummary", "label_problems", "pass_at_k", "plan_labels", "work_folder"]
