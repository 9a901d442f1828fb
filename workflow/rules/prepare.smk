"""From the user's files to what both networks read: checked tables, plans, arrays, weights."""


rule write_settings:
    """Write the settings of one stage, so that a change reruns that stage and what follows."""
    output:
        settings="results/{experiment}/settings/{stage}.yaml",
    log:
        "logs/{experiment}/settings/{stage}.log",
    wildcard_constraints:
        stage="plan|train_2d|train_3d|train_last|infer",
    priority: 1
    conda:
        "../../envs/cotrain.yaml"
    params:
        text=lambda wildcards: as_yaml(settings_of(wildcards).stages()[wildcards.stage]),
    shell:
        "printf '%s' {params.text:q} > {output.settings:q} 2> {log:q}"


rule check_data:
    """Open every image and label, list all problems; if there are none, list the cases of a split.

    A split's list is made anew where it changes itself, or the one before it: labelled, unlabelled,
    test. So a scan added to the unlabelled ones does not train the control again.
    """
    input:
        before=list_before,
    output:
        cases="results/{experiment}/cases/{split}.tsv",
    log:
        "logs/{experiment}/cases/check_data_{split}.log",
    benchmark:
        "benchmarks/{experiment}/cases/check_data_{split}.tsv"
    priority: 1
    conda:
        "../../envs/cotrain.yaml"
    threads: 4
    resources:
        mem_mb=memory(6000),
        runtime=240,
    params:
        # A hash of this split's rows and files; not of the whole table, which may hold other news. It
        # is part of the list: a run that ended after it would forget that a file was corrected.
        listed=fingerprint_of,
        # With `output` Snakemake does not track them: the same rows in a table of another name are no
        # news, which would go through a cluster's queue once for each step.
        table=lambda wildcards, output: str(settings_of(wildcards).cases),
        data_folder=lambda wildcards, output: data_folder_of(wildcards),
        labels=labels_of,
        transductive=transductive_or_not,
        out_dir=subpath(output.cases, parent=True),
    shell:
        r"""
        cotrain check-data \
            --cases {params.table:q} \
            --data-folder {params.data_folder:q} \
            --labels {params.labels:q} \
            --list {wildcards.split} \
            --fingerprint {params.listed} \
            --out-dir {params.out_dir:q} \
            --jobs {threads} \
            {params.transductive} \
            >{log:q} 2>&1
        """


rule describe_data:
    """Report on the data set: geometry, intensities, volumes, pictures and warnings."""
    input:
        cases=lambda wildcards: str(settings_of(wildcards).cases),
        lists=lists_of_cases,
    output:
        table="results/{experiment}/cases/dataset.tsv",
        page=report(
            "results/{experiment}/cases/dataset_report.html",
            caption="../report/dataset_report.rst",
            category="1 Data",
            labels={"experiment": "{experiment}", "file": "data set"},
        ),
    log:
        "logs/{experiment}/cases/describe_data.log",
    benchmark:
        "benchmarks/{experiment}/cases/describe_data.tsv"
    priority: 1
    conda:
        "../../envs/cotrain.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=240,
    params:
        data_folder=data_folder_of,
        labels=labels_of,
        channels=lambda wildcards: list(settings_of(wildcards).channels),
        transductive=transductive_or_not,
        out_dir=subpath(output.table, parent=True),
    shell:
        r"""
        cotrain check-data \
            --cases {input.cases:q} \
            --data-folder {params.data_folder:q} \
            --labels {params.labels:q} \
            --channels {params.channels:q} \
            --out-dir {params.out_dir:q} \
            --jobs {threads} \
            {params.transductive} \
            >{log:q} 2>&1
        # A log is not where people look while training begins.
        grep ^warning {log:q} >&2 || true
        """


rule plan:
    """Let nnU-Net plan on the labelled cases; the plans hold for the whole experiment."""
    input:
        settings="results/{experiment}/settings/plan.yaml",
        cases="results/{experiment}/cases/labelled.tsv",
        network=own_network_of,
    output:
        plans="results/{experiment}/preprocessed/plans.json",
        dataset="results/{experiment}/preprocessed/dataset.json",
        fingerprint="results/{experiment}/preprocessed/dataset_fingerprint.json",
    log:
        "logs/{experiment}/preprocessed/plan.log",
    benchmark:
        "benchmarks/{experiment}/preprocessed/plan.tsv"
    conda:
        "../../envs/cotrain.yaml"
    threads: 4
    resources:
        mem_mb=memory(12000),
        runtime=240,
    params:
        out_dir=subpath(output.plans, parent=True),
        seen=lambda wildcards: as_they_lie(own_network_of(wildcards)),
    shell:
        r"""
        cotrain plan \
            --settings {input.settings:q} \
            --cases {input.cases:q} \
            --out-dir {params.out_dir:q} \
            --jobs {threads} \
            >{log:q} 2>&1
        """


rule preprocess:
    """Bring a shard of cases onto the planned grid, labelled and unlabelled by the same plans."""
    input:
        plans="results/{experiment}/preprocessed/plans.json",
        cases="results/{experiment}/cases/{split}.tsv",
    output:
        manifest="results/{experiment}/preprocessed/{split}/manifest-{shard}.tsv",
    log:
        "logs/{experiment}/preprocessed/{split}-{shard}.log",
    benchmark:
        "benchmarks/{experiment}/preprocessed/{split}-{shard}.tsv"
    priority: 1
    conda:
        "../../envs/cotrain.yaml"
    threads: 2
    resources:
        mem_mb=memory(12000),
        runtime=240,
    params:
        preprocessed=subpath(input.plans, parent=True),
        shards=lambda wildcards: shards_of(wildcards.experiment, wildcards.split),
        out_dir=subpath(output.manifest, parent=True),
        with_label=lambda wildcards: (
            "--with-label" if wildcards.split == "labelled" else ""
        ),
    shell:
        r"""
        cotrain preprocess \
            --preprocessed {params.preprocessed:q} \
            --cases {input.cases:q} \
            --shard {wildcards.shard} \
            --shards {params.shards} \
            --out-dir {params.out_dir:q} \
            --jobs {threads} \
            {params.with_label} \
            >{log:q} 2>&1
        """


rule fetch_weights:
    """Get the 2D encoder's pretrained weights as one file, on the machine with internet."""
    input:
        source=weights_given_as_file,
    output:
        weights="results/{experiment}/weights/encoder.safetensors",
        record="results/{experiment}/weights/encoder.json",
    log:
        "logs/{experiment}/weights/fetch_weights.log",
    benchmark:
        "benchmarks/{experiment}/weights/fetch_weights.tsv"
    priority: 1
    conda:
        "../../envs/cotrain.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=60,
    params:
        encoder=lambda wildcards: settings_of(wildcards).network_2d.encoder,
        source=lambda wildcards: settings_of(wildcards).network_2d.weights,
        sha256=lambda wildcards: option(
            "--sha256", settings_of(wildcards).network_2d.weights_sha256
        ),
        seen=lambda wildcards: as_they_lie(weights_given_as_file(wildcards)),
    shell:
        r"""
        cotrain fetch-weights \
            --encoder {params.encoder:q} \
            --source {params.source:q} \
            --out {output.weights:q} \
            {params.sha256} \
            >{log:q} 2>&1
        """
