#!/usr/bin/env bash
# Every route, with curl.
#   serve/clients/curl.sh
# CRYSTALLM_KIT_URL (default http://127.0.0.1:8000) says where, CRYSTALLM_KIT_KEY holds the key if one is asked for.
set -euo pipefail

url="${CRYSTALLM_KIT_URL:-http://127.0.0.1:8000}"
# The key goes through a file descriptor: on the command line all users of the machine could read it.
ask() {
  curl --fail-with-body --silent --show-error \
    --config <(printf 'header = "Authorization: Bearer %s"\n' "${CRYSTALLM_KIT_KEY:-none}") \
    --header 'Content-Type: application/json' "$@"
  echo
}

ask "$url/healthz"
ask "$url/readyz"
ask "$url/v1/models"
ask "$url/v1/completions" --data '{"conditions": {"formula": "NaCl", "spacegroup": "Fm-3m"}, "n": 2, "seed": 1}'
ask "$url/v1/chat/completions" --data '{"messages": [{"role": "user", "content": "rock salt, NaCl"}], "seed": 1}'
ask "$url/v1/crystals" --data '{"prompt": "two oxides of lithium with a band gap above 2 eV", "seed": 1}'
# -N: each crystal is shown as it comes
ask -N "$url/v1/crystals" --data '{"conditions": {"formula": "BaTiO3"}, "n": 2, "format": "extxyz", "stream": true}'
ask "$url/metrics"
