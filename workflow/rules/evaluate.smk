"""Evaluation: in, checkpoints of both arms; out, masks of the test cases and their scores."""


rule infer_test_masks:
    """Infer one network's masks of a shard of test cases."""
    input:
        checkpoint="results/{experiment}/{arm}/round-{round}/train_{network}/checkpoint.pth",
        settings="results/{experiment}/settings/infer.yaml",
        plans="results/{experiment}/preprocessed/plans.json",
        cases="results/{experiment}/cases/test.tsv",
        arrays="results/{experiment}/preprocessed/test/manifest-{shard}.tsv",
    output:
        manifest="results/{experiment}/{arm}/round-{round}/test_{network}/manifest-{shard}.tsv",
        provenance="results/{experiment}/{arm}/round-{round}/test_{network}/provenance-{shard}.json",
    log:
        "logs/{experiment}/{arm}/round-{round}/test_{network}-{shard}.log",
    benchmark:
        "benchmarks/{experiment}/{arm}/round-{round}/test_{network}-{shard}.tsv"
    priority: priority_of_arm
    conda:
        "../../envs/cotrain.yaml"
    threads: 4
    resources:
        mem_mb=network_mem_mb,
        runtime=240,
        gpu=gpus_wanted,
    params:
        preprocessed=subpath(input.plans, parent=True),
        shards=lambda wildcards: shards_of(wildcards.experiment, "test"),
        out_dir=subpath(output.manifest, parent=True),
    shell:
        r"""
        cotrain infer \
            --network {wildcards.network} \
            --checkpoint {input.checkpoint:q} \
            --settings {input.settings:q} \
            --preprocessed {params.preprocessed:q} \
            --split test \
            --cases {input.cases:q} \
            --shard {wildcards.shard} \
            --shards {params.shards} \
            --out-dir {params.out_dir:q} \
            --threads {threads} \
            >{log:q} 2>&1
        """


rule merge_test_masks:
    """Average both networks' masks of a shard of test cases: a strong baseline that costs nothing."""
    input:
        manifests=test_masks_to_average,
        plans="results/{experiment}/preprocessed/plans.json",
        cases="results/{experiment}/cases/test.tsv",
    output:
        manifest="results/{experiment}/{arm}/round-{round}/test_mean/manifest-{shard}.tsv",
        provenance="results/{experiment}/{arm}/round-{round}/test_mean/provenance-{shard}.json",
    log:
        "logs/{experiment}/{arm}/round-{round}/test_mean-{shard}.log",
    benchmark:
        "benchmarks/{experiment}/{arm}/round-{round}/test_mean-{shard}.tsv"
    conda:
        "../../envs/cotrain.yaml"
    threads: 1
    resources:
        mem_mb=merge_mem_mb,
        runtime=240,
    params:
        masks=lambda wildcards, input: folders_of(input.manifests),
        preprocessed=subpath(input.plans, parent=True),
        shards=lambda wildcards: shards_of(wildcards.experiment, "test"),
        out_dir=subpath(output.manifest, parent=True),
    shell:
        r"""
        cotrain merge \
            --masks {params.masks:q} \
            --preprocessed {params.preprocessed:q} \
            --split test \
            --cases {input.cases:q} \
            --shard {wildcards.shard} \
            --shards {params.shards} \
            --out-dir {params.out_dir:q} \
            --threads {threads} \
            >{log:q} 2>&1
        """


rule evaluate:
    """Score test masks against the labels, on each image's own grid."""
    input:
        manifests=manifests_of_test_masks,
        cases="results/{experiment}/cases/test.tsv",
    output:
        scores="results/{experiment}/evaluation/{arm}_{network}_round-{round}.tsv",
    log:
        "logs/{experiment}/evaluation/{arm}_{network}_round-{round}.log",
    benchmark:
        "benchmarks/{experiment}/evaluation/{arm}_{network}_round-{round}.tsv"
    wildcard_constraints:
        network="2d|3d|mean",
    conda:
        "../../envs/cotrain.yaml"
    threads: 1
    resources:
        # Where voxels far apart are taken for a label, distances are computed over a whole CT.
        mem_mb=memory(8000),
        runtime=lambda wildcards, attempt: attempt * 240,
    params:
        masks=lambda wildcards, input: folders_of(input.manifests),
        labels=labels_of,
    shell:
        r"""
        cotrain evaluate \
            --masks {params.masks:q} \
            --cases {input.cases:q} \
            --labels {params.labels:q} \
            --out {output.scores:q} \
            >{log:q} 2>&1
        """
