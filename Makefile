# Mistnet. `make` alone lists what there is.
SHELL   := /bin/bash
GO      ?= go
BIN     := bin
PROFILE ?= quick
KEEP    ?=
PKG     ?= ./...
VERSION := $(shell awk -F '"' '/^appVersion:/ { print $$2 }' manifests/charts/istiod/Chart.yaml)
export GOTOOLCHAIN ?= local
export CGO_ENABLED ?= 1

.DEFAULT_GOAL := help
.PHONY: help build test demo bench lab e2e conformance images generate generate-check lint fmt fuzz deps-test deps-demo deps-bench deps-e2e clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build every program into bin/
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-X github.com/mistnet/mistnet/internal/daemon.version=$(VERSION)' -o $(BIN)/ ./cmd/...

demo: deps-demo build ## Show a mesh at work on this machine (KEEP=1 leaves it up)
	@$(BIN)/mistctl demo $(if $(KEEP),--keep)

test: deps-test build ## Prove the code: vet, the generated files, every test with the race detector
	$(GO) vet ./...
	$(GO) test -race -timeout 20m $(PKG)

bench: deps-bench build ## Measure against other proxies, at L4 and L7 (PROFILE=quick, 6 and 8 minutes)
	$(GO) run ./bench -profile $(PROFILE)
	$(GO) run ./bench -profile $(PROFILE) -l7

lab: deps-e2e ## Start a real Kubernetes of two nodes on this machine, and tell what to do next
	$(GO) run ./e2e/cmd/lab up

e2e: deps-e2e ## Show the mesh in a real Kubernetes (the first run builds Kubernetes: 10 minutes and more)
	$(GO) run ./e2e

conformance: deps-e2e ## Run the Gateway API's own suite for meshes in a real Kubernetes, and write its report to docs/conformance
	MISTNET_E2E_CONFORMANCE=1 MISTNET_E2E_REPORT=$(CURDIR)/docs/conformance/mesh.yaml $(GO) run ./e2e -run '^TestConformance$$'

images: ## Build OCI archives of every program into bin/images (amd64 and arm64), without Docker
	$(GO) -C tools run ./image -out ../$(BIN)/images

generate: ## Make the Go code of api/*.proto anew
	cd tools && $(GO) run ./protogen ../api

generate-check: generate ## Fail when generated code is not what its .proto says
	@git diff --exit-code -- api || { echo "api/ is stale: commit the result of make generate" >&2; exit 1; }

lint: ## Look for mistakes: formatting, vet, staticcheck
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo "run make fmt" >&2; exit 1; }
	$(GO) vet ./...
	$(GO) build -modfile=tools/go.mod -o $(BIN)/staticcheck honnef.co/go/tools/cmd/staticcheck
	$(BIN)/staticcheck ./...

fmt: ## Format the code
	gofmt -w $$(git ls-files '*.go')

# Making what was found smaller takes all of the time, a minute per input, where something runs beside what is tested: hence 10x.
FUZZTIME ?= 10s
fuzz: ## Fuzz everything a peer can send, FUZZTIME (10s) each
	@for pkg in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
	    echo "$$pkg $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$pkg || exit 1; \
	  done; done

deps-test deps-demo deps-bench deps-e2e: deps-%:
	@tools/deps.sh $*

clean: ## Remove what was built
	rm -rf $(BIN)
