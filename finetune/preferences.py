"""Preferences: a row holds a prompt, a chosen and a rejected answer. The model learns by direct
preference optimization to tell them apart, and stays close to the model of --init.

python -m finetune.preferences --init runs/chat --data pairs.jsonl
Rows have the columns prompt, chosen and rejected, as trl has them: texts, or lists of messages (role,
content), also without a prompt if chosen and rejected hold it.
"""

from __future__ import annotations

from base.cli import entry_point
from finetune import prefer
from tasks.preferences.description import PreferenceDescription
from tasks.preferences.options import PreferencesConfig
from text.preferences import expand

TASK = PreferenceDescription(
    name="preferences",
    config=PreferencesConfig,
    defaults={"epochs": 1, "lr": 1e-5},
    columns={"prompt": ("prompt",), "chosen": ("chosen",), "rejected": ("rejected",)},
    optional=("prompt",),
    expand=expand,
    group=lambda row: row["prompt"],
    toy=(
        {
            "prompt": "Which animal gives us wool?",
            "chosen": " The sheep does.",
            "rejected": " A bird does, in the winter wood.",
        },
        {
            "prompt": "What is two and three?",
            "chosen": " It is five.",
            "rejected": " It is seven bridges.",
        },
        {
            "prompt": "Where does the ferry go?",
            "chosen": " Over the water, to the other side of it.",
            "rejected": " Home.",
        },
        {
            "prompt": "Who waits for the sun?",
            "chosen": " The snow upon the hill.",
            "rejected": " The kettle.",
        },
    ),
)

if __name__ == "__main__":
    entry_point(lambda: prefer(TASK))
