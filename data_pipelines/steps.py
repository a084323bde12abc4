"""The steps by name, each with the class ("module:class") that a pipeline's YAML sets the arguments of. A step of one's own is
named by `step: module:class` there, or added here."""

from __future__ import annotations

STEPS = {
    "warc": "data_pipelines.web.warc:ReadWarc",
    "resolve": "data_pipelines.web.resolve:Resolve",
    "fetch": "data_pipelines.web.fetch:Fetch",
    "extract": "data_pipelines.web.extract:Extract",
    "report": "data_pipelines.corpus.report:Report",
    "samples": "data_pipelines.corpus.samples:ReadSamples",
    "export": "data_pipelines.corpus.export:Export",
    "decontaminate": "data_pipelines.corpus.decontaminate:Decontaminate",
    "keys": "data_pipelines.corpus.dedup:DedupKeys",
    "buckets": "data_pipelines.corpus.dedup:DedupBuckets",
    "dedup": "data_pipelines.corpus.dedup:Dedup",
    "filter": "data_pipelines.corpus.filter:Filter",
    "write": "data_pipelines.corpus.write:WriteShards",
    "seal": "data_pipelines.corpus.seal:Seal",
    "takedown": "data_pipelines.corpus.takedown:Takedown",
    "tokenizer": "data_pipelines.tokenizer:TrainTokenizer",
}
