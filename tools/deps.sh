#!/usr/bin/env bash
# Installs what `make test`, `make demo`, `make bench` or `make e2e` need from the distribution (Debian 12, Ubuntu 22.04 or newer),
# says what it installs, and does nothing when it is all there.
set -euo pipefail

usage() { echo "usage: $0 test|demo|bench|e2e" >&2; exit 2; }
[ $# -eq 1 ] || usage

# What each purpose needs: a file that proves it is there, and the package that brings it.
needs=(iptables:iptables ip:iproute2 nft:nftables ipset:ipset /usr/lib/cni/bridge:containernetworking-plugins)
case $1 in
  test)  needs+=(gcc:gcc /usr/include/stdlib.h:libc6-dev curl:curl openssl:openssl) ;;
  demo)  ;;
  e2e)   needs+=(runc:runc conntrack:conntrack ps:procps nsenter:util-linux openssl:openssl) ;;
  bench) needs+=(nginx:nginx /usr/lib/nginx/modules/ngx_stream_module.so:libnginx-mod-stream haproxy:haproxy nghttpx:nghttp2-proxy) ;;
  *) usage ;;
esac

version=$(go version 2>/dev/null || true)
case $version in
  *go1.2[6-9]*|*go1.[3-9][0-9]*) ;;
  "") echo "Go is missing: install Go 1.26 or newer and put it on PATH" >&2; exit 1 ;;
  *) echo "$version is too old: install Go 1.26 or newer" >&2; exit 1 ;;
esac

export PATH=$PATH:/usr/sbin:/sbin
missing=()
for need in "${needs[@]}"; do
  proof=${need%:*} package=${need##*:}
  if [[ $proof == /* ]]; then [ -e "$proof" ] && continue; else command -v "$proof" >/dev/null && continue; fi
  missing+=("$package")
done

if [ "$(id -u)" -ne 0 ]; then
  case $1 in
    test) echo "not root: tests that need network namespaces are skipped; run as root for all of them" ;;
    *) echo "make $1 needs root: it makes network namespaces and redirects traffic in them" >&2; exit 1 ;;
  esac
  if [ ${#missing[@]} -gt 0 ]; then echo "not root: these packages are not installed: ${missing[*]}"; fi
  exit 0
fi
[ ${#missing[@]} -eq 0 ] && exit 0

command -v apt-get >/dev/null || { echo "please install: ${missing[*]}" >&2; exit 1; }
echo "installing from the distribution: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# A package that brings a service must not start it here.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap 'rm -f $policy' EXIT
  printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
fi
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || {
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}
