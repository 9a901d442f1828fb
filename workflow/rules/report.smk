"""The end of the run: in, scores, curves, audits and checkpoints; out, a summary and the model."""


rule summarise:
    """Say in one table and two plots whether co-training beat training on the labels alone."""
    input:
        evaluation=lambda wildcards: evaluations_of(wildcards.experiment),
        curves=lambda wildcards: curves_of(wildcards.experiment),
        audits=lambda wildcards: audits_of(wildcards.experiment, ".tsv"),
    output:
        scores=report(
            "results/{experiment}/summary/scores.tsv",
            caption="../report/scores.rst",
            category="3 Result",
            labels={"experiment": "{experiment}", "file": "scores"},
        ),
        text=report(
            "results/{experiment}/summary/summary.txt",
            caption="../report/summary.rst",
            category="3 Result",
            labels={"experiment": "{experiment}", "file": "summary"},
        ),
        dice_per_round=report(
            "results/{experiment}/summary/dice_per_round.png",
            caption="../report/dice_per_round.rst",
            category="3 Result",
            labels={"experiment": "{experiment}", "file": "Dice per round"},
        ),
        training_curves=report(
            "results/{experiment}/summary/training_curves.png",
            caption="../report/training_curves.rst",
            category="3 Result",
            labels={"experiment": "{experiment}", "file": "training curves"},
        ),
    log:
        "logs/{experiment}/summary/summarise.log",
    benchmark:
        "benchmarks/{experiment}/summary/summarise.tsv"
    conda:
        "../../envs/cotrain.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=30,
    params:
        # Lists of files can be empty, and a bare option would take the next word for its value.
        evaluation=lambda wildcards, input: options("--evaluation", input.evaluation),
        audits=lambda wildcards, input: options("--audits", input.audits),
        note=lambda wildcards: option("--note", note_of(wildcards)),
        out_dir=subpath(output.text, parent=True),
    shell:
        r"""
        cotrain summarise \
            {params.evaluation} \
            --curves {input.curves:q} \
            {params.audits} \
            {params.note} \
            --out-dir {params.out_dir:q} \
            >{log:q} 2>&1
        """


rule draw_montage:
    """Draw one unlabelled case with its masks through the rounds."""
    input:
        image=image_in_montage,
        truth=truth_in_montage,
        manifests=lambda wildcards: pseudo_masks_of(
            wildcards.experiment, rounds_in_montage(wildcards.experiment)
        ),
    output:
        picture=report(
            "results/{experiment}/summary/montage.png",
            caption="../report/montage.rst",
            category="3 Result",
            labels={
                "experiment": "{experiment}",
                "file": "one case through the rounds",
            },
        ),
    log:
        "logs/{experiment}/summary/montage.log",
    benchmark:
        "benchmarks/{experiment}/summary/montage.tsv"
    conda:
        "../../envs/cotrain.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=30,
    params:
        truth=lambda wildcards, input: option("--truth", input.truth),
        masks=masks_in_montage,
        labels=labels_of,
        case=lambda wildcards: case_in_montage(wildcards)["case"],
    shell:
        r"""
        cotrain montage \
            --image {input.image:q} \
            {params.truth} \
            --masks {params.masks:q} \
            --labels {params.labels:q} \
            --title {params.case:q} \
            --out {output.picture:q} \
            >{log:q} 2>&1
        """


rule export:
    """Write the last co-trained 3D network as a plain nnU-Net model folder."""
    input:
        checkpoint=last_checkpoint,
        averaged_with=lambda wildcards: last_checkpoint(wildcards, "2d"),
        trained=last_provenance,
        plans="results/{experiment}/preprocessed/plans.json",
        dataset="results/{experiment}/preprocessed/dataset.json",
        fingerprint="results/{experiment}/preprocessed/dataset_fingerprint.json",
        settings="results/{experiment}/settings/infer.yaml",
    output:
        plans="results/{experiment}/model/Dataset001_cotrain/nnUNetTrainer__nnUNetPlans__3d_fullres/plans.json",
        dataset="results/{experiment}/model/Dataset001_cotrain/nnUNetTrainer__nnUNetPlans__3d_fullres/dataset.json",
        fingerprint="results/{experiment}/model/Dataset001_cotrain/nnUNetTrainer__nnUNetPlans__3d_fullres/dataset_fingerprint.json",
        checkpoint="results/{experiment}/model/Dataset001_cotrain/nnUNetTrainer__nnUNetPlans__3d_fullres/fold_all/checkpoint_final.pth",
        provenance="results/{experiment}/model/provenance.json",
    log:
        "logs/{experiment}/model/export.log",
    benchmark:
        "benchmarks/{experiment}/model/export.tsv"
    conda:
        "../../envs/cotrain.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=30,
    params:
        preprocessed=subpath(input.plans, parent=True),
        out_dir=subpath(output.provenance, parent=True),
    shell:
        r"""
        cotrain export \
            --checkpoint {input.checkpoint:q} \
            --averaged-with {input.averaged_with:q} \
            --trained {input.trained:q} \
            --preprocessed {params.preprocessed:q} \
            --settings {input.settings:q} \
            --out-dir {params.out_dir:q} \
            >{log:q} 2>&1
        """


rule compare:
    """Put the experiments of a table beside each other, with means over seeds or labelled sets."""
    input:
        evaluation=compared_scores,
    output:
        text=report(
            "results/{comparison}/comparison/comparison.txt",
            caption="../report/comparison.rst",
            category="4 Comparison",
            labels={"experiment": "{comparison}", "file": "comparison"},
        ),
        table="results/{comparison}/comparison/comparison.tsv",
        plot=report(
            "results/{comparison}/comparison/comparison.png",
            caption="../report/comparison.rst",
            category="4 Comparison",
            labels={"experiment": "{comparison}", "file": "gain of each experiment"},
        ),
    log:
        "logs/{comparison}/comparison/compare.log",
    benchmark:
        "benchmarks/{comparison}/comparison/compare.tsv"
    conda:
        "../../envs/cotrain.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=30,
    params:
        experiments=compared_experiments,
        out_dir=subpath(output.text, parent=True),
    shell:
        r"""
        cotrain compare \
            --experiments {params.experiments:q} \
            --evaluation {input.evaluation:q} \
            --out-dir {params.out_dir:q} \
            >{log:q} 2>&1
        """
