"""Pseudo-masks: in, a round's checkpoint; out, masks of all unlabelled cases, in shards.

The masks themselves are not declared, or the number of files would grow with the cases: the
manifest of a shard, written last, stands for them.
"""


rule infer_pseudo_masks:
    """Infer one network's masks of a shard of unlabelled cases."""
    input:
        checkpoint="results/{experiment}/cotrain/round-{round}/train_{network}/checkpoint.pth",
        settings="results/{experiment}/settings/infer.yaml",
        plans="results/{experiment}/preprocessed/plans.json",
        cases="results/{experiment}/cases/unlabelled.tsv",
        arrays="results/{experiment}/preprocessed/unlabelled/manifest-{shard}.tsv",
    output:
        manifest="results/{experiment}/cotrain/round-{round}/pseudo_{network}/manifest-{shard}.tsv",
        provenance="results/{experiment}/cotrain/round-{round}/pseudo_{network}/provenance-{shard}.json",
    log:
        "logs/{experiment}/cotrain/round-{round}/pseudo_{network}-{shard}.log",
    benchmark:
        "benchmarks/{experiment}/cotrain/round-{round}/pseudo_{network}-{shard}.tsv"
    priority: 1
    conda:
        "../../envs/cotrain.yaml"
    threads: 4
    resources:
        mem_mb=network_mem_mb,
        runtime=480,
        gpu=gpus_wanted,
    params:
        preprocessed=subpath(input.plans, parent=True),
        shards=lambda wildcards: shards_of(wildcards.experiment, "unlabelled"),
        out_dir=subpath(output.manifest, parent=True),
    shell:
        r"""
        cotrain infer \
            --network {wildcards.network} \
            --checkpoint {input.checkpoint:q} \
            --settings {input.settings:q} \
            --preprocessed {params.preprocessed:q} \
            --split unlabelled \
            --cases {input.cases:q} \
            --shard {wildcards.shard} \
            --shards {params.shards} \
            --out-dir {params.out_dir:q} \
            --threads {threads} \
            >{log:q} 2>&1
        """


rule merge_pseudo_masks:
    """Average both networks' latest masks of a shard; the mean teaches {network} in this round."""
    input:
        manifests=manifests_behind_teaching_masks,
        plans="results/{experiment}/preprocessed/plans.json",
        cases="results/{experiment}/cases/unlabelled.tsv",
    output:
        manifest="results/{experiment}/cotrain/round-{round}/teacher_{network}/manifest-{shard}.tsv",
        provenance="results/{experiment}/cotrain/round-{round}/teacher_{network}/provenance-{shard}.json",
    log:
        "logs/{experiment}/cotrain/round-{round}/teacher_{network}-{shard}.log",
    benchmark:
        "benchmarks/{experiment}/cotrain/round-{round}/teacher_{network}-{shard}.tsv"
    priority: 1
    conda:
        "../../envs/cotrain.yaml"
    threads: 1
    resources:
        mem_mb=merge_mem_mb,
        runtime=240,
    params:
        masks=lambda wildcards, input: folders_of(input.manifests),
        preprocessed=subpath(input.plans, parent=True),
        shards=lambda wildcards: shards_of(wildcards.experiment, "unlabelled"),
        out_dir=subpath(output.manifest, parent=True),
    shell:
        r"""
        cotrain merge \
            --masks {params.masks:q} \
            --preprocessed {params.preprocessed:q} \
            --split unlabelled \
            --cases {input.cases:q} \
            --shard {wildcards.shard} \
            --shards {params.shards} \
            --out-dir {params.out_dir:q} \
            --threads {threads} \
            >{log:q} 2>&1
        """
