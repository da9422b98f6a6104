"""LoRA on all kinds of models, by the invariants of every method."""

from __future__ import annotations

import peft
from grid import MethodTests

from nbtune.peft import LoraConfig


class TestLora(MethodTests):
    config, oracle = LoraConfig, peft.LoraConfig
    cases = [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "rank_pattern": {"down_proj": 3}}),
        ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 4, "alpha_pattern": {"c_attn": 20}, "bias": "lora_only"}),
        ("t5", {"target_modules": ["q", "wo"], "r": 4, "lora_alpha": 3}),
        ("bert", {"target_modules": ["query", "dense"], "r": 4, "bias": "all"}),
        ("bert", {"target_modules": ["query"], "r": 4, "task_type": "SEQ_CLS"}),
    ]
