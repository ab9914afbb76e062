"""What `mutants.py` breaks, one thing at a time: data, from records to rows."""

from __future__ import annotations

from mutant_list import Mutant

DATA_MUTANTS = (
    Mutant(
        "labels shifted by one",
        "data/collate.py",
        "source = np.arange(start - 1, end - 1)",
        "source = np.arange(start, end)",
        "unit/test_collate.py",
    ),
    Mutant(
        "first token of a response predicted by the row in front of it",
        "data/collate.py",
        "source[0] = ends[tree.parents[node]] - 1",
        "source[0] = start - 1",
        "unit/test_collate.py",
    ),
    Mutant(
        "shared token counted for one response only",
        "data/collate.py",
        "for node in tree.response_nodes(response):",
        "for node in set(tree.response_nodes(response)).difference(\n"
        "            *map(tree.response_nodes, range(response))\n        ):",
        "unit/test_collate.py",
    ),
    Mutant(
        "weighting ignored",
        "data/sampler.py",
        'if weighting == "pair":',
        "if True:",
        "unit/test_sampler.py",
    ),
    Mutant(
        "order of the data the same in every epoch",
        "data/composition.py",
        'seeded("order", fingerprint, seed, epoch)',
        'seeded("order", fingerprint, seed)',
        "unit/test_sampler.py",
    ),
    Mutant(
        "fingerprint ignored in the order of the data",
        "data/composition.py",
        'seeded("order", fingerprint, seed, epoch)',
        'seeded("order", seed, epoch)',
        "unit/test_sampler.py",
    ),
    Mutant(
        "checksums of data sets not compared",
        "data/verify.py",
        'if (found := sha256(path)) != manifest["files"][name]["sha256"]:',
        "if not (found := sha256(path)):",
        "unit/test_store.py",
    ),
    Mutant(
        "no node boundary where a response's loss begins",
        "data/tree.py",
        "        _cut(root, r.tokens, r.loss_start)\n",
        "",
        "unit/test_tree.py",
    ),
    Mutant(
        "a straddling token taken for the prompt's",
        "data/paths.py",
        "loss_start = within = common_tokens(prompt_ids, ids)",
        "loss_start = within = len(prompt_ids)",
        "unit/test_boundaries.py",
    ),
    Mutant(
        "special tokens in messages parsed",
        "data/hf_tokenizer.py",
        "if token in self._special_set and (start, end) in rendered.literal:",
        "if False:",
        "unit/test_boundaries.py",
    ),
    Mutant(
        "merged groups counted as one record",
        "data/prompt_groups.py",
        "writer.add(tree, records, len(groups))",
        "writer.add(tree, records)",
        "unit/test_merge_prompts.py",
    ),
    Mutant(
        "lower scores preferred",
        "data/formats/ultrafeedback.py",
        "reverse=True",
        "reverse=False",
        "unit/test_formats.py",
    ),
    Mutant(
        "responses scored one row early",
        "data/collate.py",
        "[tree.response_last].astype(np.int64) - 1",
        "[tree.response_last].astype(np.int64) - 2",
        "unit/test_score_targets.py",
    ),
    Mutant(
        "padding counted by routers",
        "data/collate.py",
        "served_T = np.zeros(len(is_real), np.int64)",
        "served_T = np.ones(len(is_real), np.int64)",
        "numerics/test_mixture.py",
    ),
    Mutant(
        "plan of other settings accepted",
        "data/plan_file.py",
        'if value != packed[name] and not (name == "epochs" and steps):',
        "if False:",
        "unit/test_plan_file.py",
    ),
    Mutant(
        "chunks taken as workers finish last",
        "data/workers.py",
        "item, future = waiting.popleft()",
        "item, future = waiting.pop()",
        "unit/test_workers.py",
    ),
    Mutant(
        "ranks dealt by tokens whatever they cost",
        "data/sampler.py",
        "return bundle_work(self.dataset, bundle, self.sharing).cost(self.cost)",
        "return float(bundle.num_tokens)",
        "unit/test_work.py",
    ),
    Mutant(
        "words cut apart though pieces reach over spaces",
        "data/word_cache.py",
        "and not any(s in piece.lstrip(SPACE)",
        "and not all(s in piece.lstrip(SPACE)",
        "unit/test_word_cache.py",
    ),
)
