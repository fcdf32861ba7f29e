# `make saro`: the whole method on one machine, from a base model to a report. The Makefile includes this file.
#
#   make saro DATA=DIR          on public sets; DIR has star1.json and gsm8k_train.jsonl for training, and xstest_prompts.csv,
#                               simple_safety_tests.csv, coconot_contrast_eval.jsonl and gsm8k_test.jsonl for evaluation
#   make saro                   on the data that comes with saro: small, and without any download but the demo model
#   make saro-plan [DATA=DIR]   says what is done and what is still to do
#   make saro RW="--train.lr 2e-4" SYNTH="…" SRPO="…" EVALUATE="…"    passes options to the stages
#
# All files are in $(OUTPUT)/saro. Stop it at any moment: the same command goes on with the stage that was interrupted, and
# with what that stage has done. A target is a file that its stage writes last, complete or not at all. Options that
# changed make nothing again: delete the output of a stage, data/NAME.jsonl or a folder, and those of all stages after it.
#
# Budget with DATA, for the demo model on 2 CPU cores with nothing else running: 3 hours 10 minutes, and 5 GB of disk. The
# speeds were measured. The number of pairs, and so the tokens of pp, mirror and srpo, depends on what the model writes; the rollouts
# that confirm the steps of siblings, at most eight texts a step, are not in those of pp.
#
#   stage       what there is to do                                     tokens     a second   minutes
#   convert     eight conversions                                            –            –         2
#   rw data     published chains on 1,300 prompts are read and chosen        –            –         1
#   rw          970 records, two epochs                                680,000          190        60
#   op          878 prompts, four texts each                         1,050,000          500        35
#   pp          180 prompts, steps and continuations at their forks    370,000          500        12
#   mirror      98 harmless prompts, likewise                          120,000          500         4
#   srpo        350 pairs twice, and their reference                   560,000          290        32
#   evaluate    three models, 1,533 answers each                     1,330,000          500        44

MODEL ?= demo
DATA ?=
SEED ?= 0
SYNTH ?=
RW ?=
SRPO ?=
EVALUATE ?=

SARO := $(VENV)/bin/saro
RUN := $(OUTPUT)/saro
CONFIGS := recipes/configs
PUBLIC := $(RUN)/public
comma := ,
# [a, b], as options take lists
list = '[$(subst $() ,$(comma),$(strip $(1)))]'

ifdef DATA
SUITES := $(addprefix $(PUBLIC)/,xstest.jsonl simple-safety-tests.jsonl coconot-contrast.jsonl gsm8k-200.jsonl)
# `make ablation` evaluates on AILuminate too. Whoever has it must not train on it before.
EXCLUDED := $(SUITES:200.jsonl=test.jsonl) $(if $(wildcard $(DATA)/ailuminate_demo_en.csv),$(PUBLIC)/ailuminate.jsonl)
RW_PROMPTS := $(PUBLIC)/star1-prompts.jsonl $(PUBLIC)/gsm8k-rw.jsonl
CHAINS := $(PUBLIC)/star1.jsonl $(PUBLIC)/gsm8k.jsonl
RW_DATA := --rw.fill $(call list,$(CHAINS))
# Twins: prompts in the same words of which one is harmful. Others moved only the threshold (saro/synth/README.md).
PAIR_PROMPTS := twins demo $(PUBLIC)/gsm8k-pairs.jsonl
# As many twins as the budget above allows. Values of steps take many rollouts, so pp reads fewer of the prompts that op read.
OP := --limit 700
PP := --limit 60
MIRROR := --limit 200
else
SUITES := demo
EXCLUDED := demo
RW_PROMPTS := demo
CHAINS :=
RW_DATA := --rw.draws 1
PAIR_PROMPTS := demo
OP :=
PP :=
MIRROR :=
# What people wrote joins what the model writes: 98 prompts give too few records.
WRITTEN := saro/demo/rw_train.jsonl
WRITTEN_HELDOUT := saro/demo/rw_heldout.jsonl
WRITTEN_PAIRS := saro/demo/srpo_train.jsonl
WRITTEN_PAIRS_HELDOUT := saro/demo/srpo_heldout.jsonl
RW_SIZE := --train.epochs 4 --train.records_per_step 8
endif
# Files that are made; "demo" is none.
made = $(filter $(RUN)/%,$(1))

RW_MODEL := $(RUN)/rw/final/tokenizer_config.json
SRPO_MODEL := $(RUN)/srpo/final/tokenizer_config.json
PAIRS := $(RUN)/data/op.jsonl $(RUN)/data/pp.jsonl $(RUN)/data/mirror.jsonl
REPORT := $(RUN)/evaluation/report/report.html

SYNTHESIZE = $(SARO) synth $(basename $(@F)) --config $(CONFIGS)/laptop_synth.yaml --exclude $(call list,$(EXCLUDED)) \
	--seed $(SEED) --output $@

.PHONY: saro saro-plan saro-begin
.DELETE_ON_ERROR:

saro: $(REPORT)
	@echo 'The report is $(REPORT), its tables are in $(dir $(REPORT))report.md'

# The plan

stage = @printf '%-6s %-10s %-80s %8s\n' '$(if $(wildcard $(1)),done,to do)' '$(2)' '$(3)' '$(4)'

saro-plan:
	@echo 'make saro MODEL=$(MODEL) DATA=$(DATA) SEED=$(SEED), in $(RUN); on 2 CPU cores and the demo model $(if $(DATA),3 hours 10,40) minutes in all:'
	$(if $(DATA),$(call stage,$(lastword $(SUITES)),convert,public sets -> prompts$(comma) chains and suites,2))
	$(call stage,$(RUN)/data/rw.jsonl,rw data,prompts -> chains: $(if $(DATA),public ones on the bare prompts,the model writes with the policy in view),$(if $(DATA),1,2))
	$(call stage,$(RW_MODEL),rw,chains -> a model that reasons (full fine-tuning),$(if $(DATA),60,9))
	$(call stage,$(RUN)/data/op.jsonl,op,texts of this model -> outcome pairs,$(if $(DATA),35,4))
	$(call stage,$(RUN)/data/pp.jsonl,pp,its chains -> process pairs,$(if $(DATA),12,5))
	$(call stage,$(RUN)/data/mirror.jsonl,mirror,its over-cautious chains -> process pairs on harmless prompts,$(if $(DATA),4,2))
	$(call stage,$(SRPO_MODEL),srpo,pairs -> the trained model (LoRA),$(if $(DATA),32,5))
	$(call stage,$(RUN)/evaluation/scores.json,evaluate,base$(comma) RW and SRPO: harm$(comma) refusals$(comma) ability$(comma) cost,$(if $(DATA),44,8))
	$(call stage,$(REPORT),report,one page,0)

# Finished stages would not notice another model or seed.
saro-begin: saro-plan
	@mkdir -p $(RUN) $(PUBLIC) $(RUN)/data
	@now='MODEL=$(MODEL) DATA=$(if $(DATA),$(abspath $(DATA))) SEED=$(SEED)'; \
	if test ! -e $(RUN)/settings; then \
		echo "$$now" > $(RUN)/settings.tmp && mv $(RUN)/settings.tmp $(RUN)/settings; \
	elif test "$$(cat $(RUN)/settings)" != "$$now"; then \
		echo "error: $(RUN) was begun with $$(cat $(RUN)/settings); give the same, or another OUTPUT" >&2; \
		exit 2; \
	fi

# 0. Public sets -> prompts, chains and suites. RW and the pairs have different prompts of GSM8K.

CONVERT = $(SARO) convert --overwrite

$(PUBLIC)/star1-prompts.jsonl: $(DATA)/star1.json | saro-begin $(VENV)/.demo
	$(CONVERT) star1-prompts $< $@
$(PUBLIC)/star1.jsonl: $(DATA)/star1.json | saro-begin $(VENV)/.demo
	$(CONVERT) star1 $< $@
$(PUBLIC)/gsm8k-prompts.jsonl: $(DATA)/gsm8k_train.jsonl | saro-begin $(VENV)/.demo
	$(CONVERT) gsm8k-prompts $< $@
$(PUBLIC)/gsm8k.jsonl: $(DATA)/gsm8k_train.jsonl | saro-begin $(VENV)/.demo
	$(CONVERT) gsm8k $< $@
$(PUBLIC)/xstest.jsonl: $(DATA)/xstest_prompts.csv | saro-begin $(VENV)/.demo
	$(CONVERT) xstest $< $@
$(PUBLIC)/simple-safety-tests.jsonl: $(DATA)/simple_safety_tests.csv | saro-begin $(VENV)/.demo
	$(CONVERT) simple-safety-tests $< $@
$(PUBLIC)/coconot-contrast.jsonl: $(DATA)/coconot_contrast_eval.jsonl | saro-begin $(VENV)/.demo
	$(CONVERT) coconot $< $@
$(PUBLIC)/gsm8k-test.jsonl: $(DATA)/gsm8k_test.jsonl | saro-begin $(VENV)/.demo
	$(CONVERT) gsm8k-test $< $@
$(PUBLIC)/ailuminate.jsonl: $(DATA)/ailuminate_demo_en.csv | saro-begin $(VENV)/.demo
	$(CONVERT) ailuminate $< $@

lines = @awk '$(1)' $< > $@.tmp && mv $@.tmp $@

$(PUBLIC)/gsm8k-rw.jsonl: $(PUBLIC)/gsm8k-prompts.jsonl
	$(call lines,NR <= 300)
$(PUBLIC)/gsm8k-pairs.jsonl: $(PUBLIC)/gsm8k-prompts.jsonl
	$(call lines,NR > 300 && NR <= 400)
$(PUBLIC)/gsm8k-200.jsonl: $(PUBLIC)/gsm8k-test.jsonl
	$(call lines,NR <= 200)

# 1. Chains for RW, and RW. Recipes go on with the run that their folder holds.

# Join files of records, those of held-out prompts too. A stage without held-out records has no file of them. As the files
# that they are made from, only their owner can read them.
define merge
	@umask 077; for file in $(1:.jsonl=.heldout.jsonl) $(3); do test ! -e $$file || cat $$file; done > $(basename $@)-heldout.tmp
	@umask 077; cat $(1) $(2) > $@.tmp
	@test -s $@.tmp || { echo 'error: no record in $(1); their manifests say why; change options, delete them and go on' >&2; exit 2; }
	@mv $(basename $@)-heldout.tmp $(basename $@)-heldout.jsonl
	@mv $@.tmp $@
	@echo "$$(wc -l < $@) records in $@, $$(wc -l < $(basename $@)-heldout.jsonl) held out"
endef
# As a list, empty if the file is.
heldout = "[$$(test ! -s $(1) || echo $(1))]"

# What later stages read is converted now too: a missing file is then missed at once.
$(RUN)/data/rw.jsonl: $(call made,$(RW_PROMPTS) $(CHAINS) $(EXCLUDED)) \
		| $(call made,$(PAIR_PROMPTS) $(SUITES)) saro-begin $(VENV)/.demo
	$(SYNTHESIZE) --generator $(MODEL) --prompts $(call list,$(RW_PROMPTS)) $(RW_DATA) $(SYNTH)

$(RUN)/examples.jsonl: $(RUN)/data/rw.jsonl
	$(call merge,$<,$(WRITTEN),$(WRITTEN_HELDOUT))

$(RW_MODEL): $(RUN)/examples.jsonl
	$(LAUNCH) recipes/rw.py --config $(CONFIGS)/laptop_rw.yaml --model.name $(MODEL) --data.train $(call list,$<) \
		--data.heldout $(call heldout,$(RUN)/examples-heldout.jsonl) --train.seed $(SEED) $(RW_SIZE) \
		--train.output $(RUN)/rw --resume $(RW)

# 2. Pairs of the RW model's own texts, and SRPO

$(RUN)/data/op.jsonl: $(RW_MODEL) $(call made,$(PAIR_PROMPTS) $(EXCLUDED))
	$(SYNTHESIZE) --generator $(RUN)/rw --prompts $(call list,$(PAIR_PROMPTS)) $(OP) $(SYNTH)
$(RUN)/data/pp.jsonl: $(RUN)/data/op.jsonl
	$(SYNTHESIZE) --generator $(RUN)/rw --prompts $(call list,$(PAIR_PROMPTS)) $(PP) $(SYNTH)
$(RUN)/data/mirror.jsonl: $(RUN)/data/op.jsonl
	$(SYNTHESIZE) --generator $(RUN)/rw --prompts $(call list,$(PAIR_PROMPTS)) $(MIRROR) $(SYNTH)

$(RUN)/pairs.jsonl: $(PAIRS)
	$(call merge,$(PAIRS),$(WRITTEN_PAIRS),$(WRITTEN_PAIRS_HELDOUT))

# Exit code 1 is a fault of the records, which people should read; it does not stop the run.
$(RUN)/pairs.check.txt: $(RUN)/pairs.jsonl
	$(SARO) synth check $< --model $(RUN)/rw > $@.tmp || test $$? -eq 1
	@cat $@.tmp
	@! grep -q ^FAIL $@.tmp || echo 'synth check found faults in the pairs; training goes on'
	@mv $@.tmp $@

$(SRPO_MODEL): $(RUN)/pairs.jsonl $(RUN)/pairs.check.txt
	$(LAUNCH) recipes/srpo.py --config $(CONFIGS)/laptop_srpo.yaml --model.name $(RUN)/rw/final --data.train $(call list,$<) \
		--data.heldout $(call heldout,$(RUN)/pairs-heldout.jsonl) --train.seed $(SEED) --train.output $(RUN)/srpo --resume $(SRPO)

# 3. Evaluation and report

$(RUN)/evaluation/scores.json: $(SRPO_MODEL) $(call made,$(SUITES))
	$(SARO) evaluate --config $(CONFIGS)/laptop_evaluate.yaml --models $(call list,$(MODEL) $(RUN)/rw $(RUN)/srpo) \
		--names '[base,RW,SRPO]' --suites $(call list,$(SUITES)) --seed $(SEED) --output $(RUN)/evaluation $(EVALUATE)

$(REPORT): $(RUN)/evaluation/scores.json
	$(SARO) report $(RUN)/evaluation --runs $(call list,$(RUN)/rw $(RUN)/srpo) --overwrite
