# Short names for what the scripts do; `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help demo demo-down test test-law bench bench-operator check generate images cluster-up cluster-down

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: ## one RLHFJob from nothing to a trained model on this machine (MODEL=smollm2: a larger one; DEMO_KUBECONFIG=path: on that cluster)
	tests/demo.sh

demo-down: ## leaves nothing of the demo running
	tests/demo.sh down

test: ## builds all and runs every test, those on a cluster too
	tests/run.sh

test-law: ## every strategy, split and family against the plain run; hours on two cores
	tests/law.sh

bench: ## speed and memory of the trainer's settings, each beside the one it is compared with (MODEL: a key or folder)
	tests/bench.sh

bench-operator: ## the operator with 1,000 jobs at once on played nodes (JOBS, STAGES, IDLE_SECONDS: another size; PEER=1: Kubeflow Trainer too; KILLS=10: killed on the way; HOSTILE=1: beside a hostile namespace)
	tests/bench-operator.sh

check: ## the static checks, cheapest first
	tests/check.sh

generate: ## writes the custom resource definition anew, from crds/src/job
	mkdir -p target
	cargo run --release --locked --quiet --bin crdgen > target/rlhfjob.yaml
	cp target/rlhfjob.yaml crds/rlhfjob.yaml
	cp target/rlhfjob.yaml charts/rlhf-operator/files/rlhfjob.yaml

images: ## builds the operator's and the trainer's image; a running cluster gets them
	cargo build --release --locked --workspace --bins
	tests/cluster/images.sh

cluster-up: ## starts a one-node Kubernetes on this machine
	tests/cluster/up.sh

cluster-down: ## stops it and leaves nothing of it
	tests/cluster/down.sh
