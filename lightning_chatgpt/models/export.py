"""A network as a plain transformers folder, with its tokenizer, chat template and model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_chatgpt.chat.jinja import template_of
from lightning_chatgpt.checkpoints.weights import whole_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [conversational, lightning-chatgpt]
---
# A chat model, fine-tuned with lightning_chatgpt

{facts}

It was taught with the chat template that is stored with the tokenizer ({template}), and ends each reply with `{stop}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello"}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
reply = model.generate(**prompt, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(reply[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""


def export_folder(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Write a folder that transformers loads with nothing of ours installed.

    Args:
        network: What to write.
        tokenizer: The network's; its chat template goes along.
        folder: Where to; made if it is not there, files of the same names are replaced.
        facts: What the model card tells of the model, such as its base and its validation loss.

    Returns: the folder.

    Raises:
        SaveError: It could not be written; what was there is still there.
    """
    folder = Path(folder)
    n_parameters = sum(p.numel() for p in network.parameters())
    told = {"Parameters": f"{n_parameters:,}", "Vocabulary": len(tokenizer), **(facts or {})}
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in told.items())])
    template = template_of(tokenizer)
    card = _CARD.format(facts=table, folder=folder.as_posix(), template=template.name, stop=template.stop_token)
    with whole_folder(folder) as part:
        network.save_pretrained(part, max_shard_size="5GB")
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(card, encoding="utf-8")
    return folder
