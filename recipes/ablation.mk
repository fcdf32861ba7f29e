# `make ablation`: what each part of the method buys. The Makefile includes this file behind laptop.mk, on whose data it stands.
#
#   make ablation DATA=DIR      six models, three seeds of the preference stages, all suites, one report
#   make ablation DATA=DIR SEEDS="0 1"     with other seeds of them
#
# DIR is that of laptop.mk, and has ailuminate_demo_en.csv too.
#
#   SFT             answers of the records that RW was trained on, without their reasoning
#   DPO (RW texts)  from SFT, on the answers of the outcome pairs. RW wrote them: for SFT they are off-policy, and a difference
#                   to RW+op is due to that too
#   RW              chains: `make saro`
#   RW+op           from RW, on outcome pairs
#   RW+op+pp        from RW, on outcome and process pairs
#
# DPO, RW+op and RW+op+pp take the same number of optimizer steps: that of RW+op+pp, which its pairs and SRPO= decide. With fewer
# pairs a stage passes over them more often. Records and steps of each model are in arms.txt.
#
# In $(OUTPUT)/saro/ablation. As `make saro`, it goes on where it was stopped. With `make -j N`, N stages run at the same time:
# each writes a folder of its own, and the store of draws, the reference cache and the demo model are made to be shared.

SEEDS ?= 0 1 2

ABLATION := $(RUN)/ablation
ABLATION_SUITES := $(SUITES) $(PUBLIC)/ailuminate-300.jsonl
SFT_MODEL := $(ABLATION)/sft/final/tokenizer_config.json
ABLATION_REPORT := $(ABLATION)/evaluation-$(firstword $(SEEDS))/report/report.html

# RW+op+pp with the seed of `make saro` is its last model.
full = $(if $(filter $(SEED),$(1)),$(RUN)/srpo,$(ABLATION)/pp-$(1))

.PHONY: ablation
# What rules with % make is kept, and only that: all others are made again when they are missing.
.SECONDARY: $(foreach seed,$(SEEDS),$(foreach part,dpo op pp,$(ABLATION)/$(part)-$(seed)/final/tokenizer_config.json \
	$(ABLATION)/answers/$(part)-$(seed)/scores.json)) $(ABLATION)/answers/sft/scores.json

ifndef DATA
ablation:
	@echo 'error: make ablation DATA=DIR: the few prompts that come with saro would tell no model from another' >&2; exit 2
else
ablation: $(ABLATION_REPORT) $(ABLATION)/arms.txt
	@cat $(ABLATION)/arms.txt
	@echo 'The report is $(ABLATION_REPORT), its tables are in $(dir $(ABLATION_REPORT))report.md'
endif

# The file is in the order of its hazards, so every fourth prompt has as many of each.
$(PUBLIC)/ailuminate-300.jsonl: $(PUBLIC)/ailuminate.jsonl
	$(call lines,NR % 4 == 1)

# Records without their reasoning, and the held-out ones

define answers
	@mkdir -p $(ABLATION)
	test ! -s $(1:.jsonl=$(2).jsonl) || $(CONVERT) answers $(3) $(1:.jsonl=$(2).jsonl) $(@:.jsonl=$(2).jsonl)
	$(CONVERT) answers $(3) $(1) $@
endef

# Some chains are too long for the packs of RW. Their answers are not, and would give SFT more records.
$(ABLATION)/examples.jsonl: $(RUN)/examples.jsonl $(RW_MODEL)
	$(call answers,$<,-heldout,--as_trained $(RUN)/rw)
$(ABLATION)/op.jsonl: $(RUN)/data/op.jsonl
	$(call answers,$<,.heldout)

# The models. A seed is that of the order of records and of new LoRA matrices.

$(SFT_MODEL): $(ABLATION)/examples.jsonl
	$(LAUNCH) recipes/rw.py --config $(CONFIGS)/laptop_rw.yaml --model.name $(MODEL) --data.train $(call list,$<) \
		--data.heldout $(call heldout,$(<:.jsonl=-heldout.jsonl)) --train.seed $(SEED) $(RW_SIZE) \
		--train.output $(ABLATION)/sft --resume $(RW)

PREFER = $(LAUNCH) recipes/srpo.py --config $(CONFIGS)/laptop_srpo.yaml --train.seed $* --train.output $(patsubst %/final/,%,$(@D)/) \
	--resume --data.train $(call list,$<)
# As many steps as RW+op+pp of this seed, whatever the number of records.
EQUAL_STEPS = --train.epochs 100000 --train.max_steps "$$($(SARO) runs --steps $(call full,$*))"

.SECONDEXPANSION:
$(ABLATION)/pp-%/final/tokenizer_config.json: $(RUN)/pairs.jsonl $(RW_MODEL)
	$(PREFER) --model.name $(RUN)/rw/final --data.heldout $(call heldout,$(<:.jsonl=-heldout.jsonl)) $(SRPO)
$(ABLATION)/dpo-%/final/tokenizer_config.json: $(ABLATION)/op.jsonl $(SFT_MODEL) $$(call full,$$*)/final/tokenizer_config.json
	$(PREFER) --model.name $(ABLATION)/sft/final --data.heldout $(call heldout,$(<:.jsonl=.heldout.jsonl)) $(SRPO) $(EQUAL_STEPS)
$(ABLATION)/op-%/final/tokenizer_config.json: $(RUN)/data/op.jsonl $(RW_MODEL) $$(call full,$$*)/final/tokenizer_config.json
	$(PREFER) --model.name $(RUN)/rw/final --data.heldout $(call heldout,$(<:.jsonl=.heldout.jsonl)) $(SRPO) $(EQUAL_STEPS)

# Each model answers in a process of its own, so that `make -j` asks several at the same time, and as soon as they are trained.
# The evaluations, one for each seed, find all answers in the store. A base model has the format of the first run beside it.

ASK = $(SARO) evaluate --config $(CONFIGS)/laptop_evaluate.yaml --suites $(call list,$(ABLATION_SUITES)) --attacks '[]' \
	--seed $(SEED) --output $(@D)
ANSWERS := $(ABLATION)/answers

$(ANSWERS)/rw/scores.json: $(RW_MODEL) $(call made,$(ABLATION_SUITES))
	$(ASK) --models $(call list,$(RUN)/rw $(MODEL)) --names '[RW,base]' $(EVALUATE)
$(ANSWERS)/srpo/scores.json: $(SRPO_MODEL) $(call made,$(ABLATION_SUITES))
	$(ASK) --models $(call list,$(RUN)/srpo) $(EVALUATE)
$(ANSWERS)/%/scores.json: $(ABLATION)/%/final/tokenizer_config.json $(call made,$(ABLATION_SUITES))
	$(ASK) --models $(call list,$(ABLATION)/$*) $(EVALUATE)

$(ABLATION)/evaluation-%/scores.json: $(foreach name,rw sft dpo-% op-%,$(ANSWERS)/$(name)/scores.json) \
		$(ANSWERS)/$$(notdir $$(call full,$$*))/scores.json
	$(ASK) --models $(call list,$(RUN)/rw $(MODEL) $(ABLATION)/sft $(ABLATION)/dpo-$* $(ABLATION)/op-$* $(call full,$*)) \
		--names '[RW,base,SFT,DPO (RW texts),RW+op,RW+op+pp]' $(EVALUATE)

$(ABLATION_REPORT): $(foreach seed,$(SEEDS),$(ABLATION)/evaluation-$(seed)/scores.json)
	$(SARO) report $(patsubst %/,%,$(dir $^)) --overwrite \
		--runs $(call list,$(RUN)/rw $(ABLATION)/sft $(foreach part,dpo op,$(ABLATION)/$(part)-$(firstword $(SEEDS))) \
			$(call full,$(firstword $(SEEDS))))

# What each model was trained on: records by kind, without those that were too long, and optimizer steps.

$(ABLATION)/arms.txt: $(ABLATION_REPORT)
	@$(SARO) runs $(RUN)/rw $(ABLATION)/sft \
		$(foreach seed,$(SEEDS),$(ABLATION)/dpo-$(seed) $(ABLATION)/op-$(seed) $(call full,$(seed))) \
		--names $(call list,RW SFT $(foreach seed,$(SEEDS),DPO-$(seed) RW+op-$(seed) RW+op+pp-$(seed))) > $@.tmp
	@mv $@.tmp $@
