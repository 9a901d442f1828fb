"""The audit stands in the stream: in, masks and a person's verdicts; out, what may be learnt from."""


rule write_verdicts:
    """Write a person's verdicts on the masks of one audit, so that a new one reruns that audit."""
    output:
        verdicts="results/{experiment}/cotrain/round-{round}/audit/verdicts_{network}.txt",
    log:
        "logs/{experiment}/cotrain/round-{round}/verdicts_{network}.log",
    priority: 1
    conda:
        "../../envs/cotrain.yaml"
    params:
        # The rows, not the table: it would make every audit anew, and train every round again.
        text=verdicts_as_text,
    shell:
        "printf '%s' {params.text:q} > {output.verdicts:q} 2> {log:q}"


rule audit:
    """Decide which masks this network may learn from in this round."""
    input:
        manifests=manifests_of_teaching_masks,
        source_manifests=manifests_behind_teaching_masks,
        cases="results/{experiment}/cases/unlabelled.tsv",
        plans="results/{experiment}/preprocessed/plans.json",
        corrected=corrected_masks_for,
        verdicts="results/{experiment}/cotrain/round-{round}/audit/verdicts_{network}.txt",
    output:
        table="results/{experiment}/cotrain/round-{round}/audit/train_{network}.tsv",
    log:
        "logs/{experiment}/cotrain/round-{round}/audit_{network}.log",
    benchmark:
        "benchmarks/{experiment}/cotrain/round-{round}/audit_{network}.tsv"
    priority: 1
    conda:
        "../../envs/cotrain.yaml"
    threads: 1
    resources:
        mem_mb=audit_mem_mb,
        runtime=240,
    params:
        masks=lambda wildcards, input: folders_of(input.manifests),
        source_masks=lambda wildcards, input: folders_of(input.source_manifests),
        labels=labels_of,
        preprocessed=subpath(input.plans, parent=True),
        review=review_for,
        seen=lambda wildcards: as_they_lie(corrected_masks_for(wildcards)),
    shell:
        r"""
        cotrain audit \
            --masks {params.masks:q} \
            --manifests {input.manifests:q} \
            --source-masks {params.source_masks:q} \
            --cases {input.cases:q} \
            --labels {params.labels:q} \
            --preprocessed {params.preprocessed:q} \
            {params.review} \
            --out {output.table:q} \
            >{log:q} 2>&1
        """


rule draw_audit_page:
    """Draw the audited masks on their images; nothing is trained from this page."""
    input:
        audit="results/{experiment}/cotrain/round-{round}/audit/train_{network}.tsv",
        cases="results/{experiment}/cases/unlabelled.tsv",
    output:
        page=report(
            "results/{experiment}/cotrain/round-{round}/audit/train_{network}.html",
            caption="../report/audit.rst",
            category="2 Audit",
            labels={
                "experiment": "{experiment}",
                "round": "{round}",
                "teaches": "{network}",
            },
        ),
    log:
        "logs/{experiment}/cotrain/round-{round}/audit_page_{network}.log",
    benchmark:
        "benchmarks/{experiment}/cotrain/round-{round}/audit_page_{network}.tsv"
    priority: 1
    conda:
        "../../envs/cotrain.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=60,
    params:
        labels=labels_of,
        max_cases=lambda wildcards: settings_of(wildcards).audit.max_cases,
    shell:
        r"""
        cotrain overlays \
            --audit {input.audit:q} \
            --cases {input.cases:q} \
            --labels {params.labels:q} \
            --out {output.page:q} \
            --max-cases {params.max_cases} \
            >{log:q} 2>&1
        """
