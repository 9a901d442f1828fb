"""Training: in, arrays, audited masks and the checkpoint before; out, the checkpoint of a round."""


rule train:
    """Train one network for one round, going on where the round before ended.

    Unfinished epochs lie in the undeclared folder work/, so that a killed job loses none:
    Snakemake deletes the declared outputs of a job that fails.
    """
    input:
        settings=training_settings_of,
        plans="results/{experiment}/preprocessed/plans.json",
        labelled="results/{experiment}/cases/labelled.tsv",
        arrays=labelled_arrays,
        audit=audited_masks_for,
        previous=checkpoint_before,
        encoder_weights=encoder_weights_for,
    output:
        checkpoint="results/{experiment}/{arm}/round-{round}/train_{network}/checkpoint.pth",
        curve="results/{experiment}/{arm}/round-{round}/train_{network}/curve.csv",
        provenance="results/{experiment}/{arm}/round-{round}/train_{network}/provenance.json",
    log:
        "logs/{experiment}/{arm}/round-{round}/train_{network}.log",
    benchmark:
        "benchmarks/{experiment}/{arm}/round-{round}/train_{network}.tsv"
    priority: priority_of_arm
    conda:
        "../../envs/cotrain.yaml"
    # Fewer cores give fewer threads; with 8 cores both arms train side by side.
    threads: threads_of_training
    resources:
        mem_mb=lambda wildcards, attempt: (
            network_mem_mb(wildcards, attempt) * processes_of_training(wildcards)
        ),
        runtime=1440,
        gpu=lambda wildcards: gpus_wanted(wildcards) * processes_of_training(wildcards),
        nodes=1,
    params:
        preprocessed=subpath(input.plans, parent=True),
        audit=lambda wildcards, input: option("--audit", input.audit),
        previous=lambda wildcards, input: option("--previous", input.previous),
        encoder_weights=lambda wildcards, input: option(
            "--encoder-weights", input.encoder_weights
        ),
        out_dir=subpath(output.checkpoint, parent=True),
    shell:
        r"""
        cotrain train \
            --network {wildcards.network} \
            --arm {wildcards.arm} \
            --round {wildcards.round} \
            --settings {input.settings:q} \
            --preprocessed {params.preprocessed:q} \
            --labelled {input.labelled:q} \
            {params.audit} \
            {params.previous} \
            {params.encoder_weights} \
            --out-dir {params.out_dir:q} \
            --threads {threads} \
            >{log:q} 2>&1
        """
