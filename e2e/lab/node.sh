#!/bin/bash
# The first process of a node. It is started in network, mount, uts, ipc and pid namespaces of its own, with
#   NODE NODE_IP   its name and address
#   DIR            the lab's directory          KUBE, CONTAINERD   directories of programs
#   CGROUPS        the node's cgroups, one per hierarchy of cgroup v1, or the only one of v2
#   KUBELET_FLAGS  what is not in kubelet.yaml
# and turns into a machine: its own root, then containerd, images, kubelet and kube-proxy, each started again when it ends.
set -euo pipefail

if [ -z "${BOOT:-}" ]; then
  for dir in $CGROUPS; do echo 0 >"$dir/cgroup.procs"; done # 0 is the writer
  BOOT=1 exec unshare --cgroup bash "$0"
fi

# Nothing mounted here is seen by the machine; nothing written here stays on it.
mount --make-rprivate /
hostname "$NODE"
work=$DIR/$NODE/root
mkdir -p "$work" && mount -t tmpfs -o mode=755 node "$work"
mkdir "$work"/{upper,work,root}
root=$work/root
mount -t overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" overlay "$root"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t sysfs -o nosuid,nodev,noexec sysfs "$root/sys" # of this network namespace, without the machine's cgroups
mkdir -p "$root"/lab/{kube,containerd,images,pki,node}
bind() { mkdir -p "$root$2" && mount --bind "$1" "$root$2"; }
bind "$KUBE" /lab/kube
bind "$CONTAINERD" /lab/containerd
bind "$DIR/images" /lab/images
bind "$DIR/pki" /lab/pki
bind "$DIR/$NODE" /lab/node
# The disk: what a power cut leaves.
for d in /var/lib/kubelet /var/lib/containerd /var/lib/cni /etc/cni /opt/cni /var/log/pods /var/log/containers; do
  mkdir -p "$DIR/$NODE/disk$d" && bind "$DIR/$NODE/disk$d" "$d"
done
mount -t tmpfs -o mode=755 run "$root/run"
# pivot_root, then everything of the machine's that was not taken along is out of sight.
mkdir "$root/.old" && pivot_root "$root" "$root/.old" && cd /
umount -l /.old && rmdir /.old

if [ "$CGROUPS" = "${CGROUPS#/sys/fs/cgroup/mistnet-e2e-}" ]; then # v1: shown from the node's own cgroup down
  mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
  for dir in $CGROUPS; do
    controller=${dir#/sys/fs/cgroup/} controller=${controller%%/*}
    mkdir "/sys/fs/cgroup/$controller"
    options=$controller; [ "$controller" != systemd ] || options=none,name=systemd
    mount -t cgroup -o "$options" cgroup "/sys/fs/cgroup/$controller"
  done
else # v2: a cgroup that hands controllers down holds no process itself
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
  mkdir -p /sys/fs/cgroup/init && echo 1 >/sys/fs/cgroup/init/cgroup.procs
  sed 's/\([a-z]\+\)/+\1/g' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
fi
mount -t bpf bpf /sys/fs/bpf 2>/dev/null || true
mkdir -p /run/lock /run/netns /run/etc /run/sysctl
: >/run/etc/resolv.conf
printf '127.0.0.1 localhost\n::1 localhost\n%s %s\n' "$NODE_IP" "$NODE" >/run/etc/hosts
echo "$NODE" >/run/etc/hostname
for f in resolv.conf hosts hostname; do
  real=$(readlink -f "/etc/$f"); mkdir -p "${real%/*}"; [ -e "$real" ] || : >"$real"
  mount --bind "/run/etc/$f" "$real"
done
# The kubelet sets these for the whole machine; it is shown that they are as it wants them.
for kv in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
  kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  f=/run/sysctl/$(tr / _ <<<"${kv%=*}")
  echo "${kv#*=}" >"$f" && mount --bind "$f" "/proc/sys/${kv%=*}"
done
mount --make-rshared / # so that what a pod mounts, or is to see mounted, propagates

if [ ! -e /etc/cni/net.d ]; then # the first boot of this disk
  mkdir -p /etc/cni/net.d /opt/cni/bin
  cp /usr/lib/cni/{bridge,host-local,loopback,portmap} /opt/cni/bin/
  cp /lab/node/10-lab.conflist /etc/cni/net.d/
fi
export PATH=/lab/containerd:/lab/kube:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
set +e

# keep NAME COMMAND...: as systemd's Restart=always does. /run/NAME.pid is its process; with /run/NAME.stop it stays down.
keep() {
  local name=$1; shift
  while :; do
    if [ ! -e "/run/$name.stop" ]; then
      setsid "$@" >>"/lab/node/$name.log" 2>&1 &
      echo $! >"/run/$name.pid"
      wait $!
      echo "$(date +%T) $name ended: $?" >>"/lab/node/$name.log"
      rm -f "/run/$name.pid"
    fi
    sleep 0.2
  done
}

keep containerd containerd -c /lab/node/containerd.toml </dev/null &
until ctr version >/dev/null 2>&1; do sleep 0.05; done
for image in /lab/images/*.tar; do
  ctr -n k8s.io images import --label io.cri-containerd.pinned=pinned "$image" >>/lab/node/import.log 2>&1 ||
    echo "import of $image failed" >>/lab/node/import.log
done
# shellcheck disable=SC2086
keep kubelet kubelet --config=/lab/node/kubelet.yaml --kubeconfig="/lab/pki/$NODE.kubeconfig" --hostname-override="$NODE" $KUBELET_FLAGS </dev/null &
keep kube-proxy kube-proxy --config=/lab/node/kube-proxy.yaml </dev/null &
while :; do wait; done # the shell reaps orphans meanwhile
